"""Random damage to every message of both sides raises only the named refusals, and the sum stays exact."""

from __future__ import annotations

import contextlib

import numpy as np
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from rehearsal import Rehearsal, plain_sum, random_updates

from fedtune.core.secagg import ClientFaultError, RoundAbortedError, Segment, Served, ServerFaultError, Stage

SEGMENTS = (Segment("v", 5, 8, 15, (0,)), Segment("weight", 1, 32, 1 << 20, (0,)))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_damaged_and_misplaced_requests_never_disturb_a_client(data: st.DataObject) -> None:
    """Before each good request every client gets bad ones: damaged, empty, from earlier exchanges, or for others."""
    rehearsal = Rehearsal.prepare([0] * 4, SEGMENTS)
    updates = random_updates(rehearsal.server.config)
    history: list[bytes] = []
    requests = rehearsal.server.open()
    while requests:
        for client, request in requests.items():
            session = rehearsal.clients[client]
            for _ in range(data.draw(st.integers(0, 2))):
                bad = data.draw(damaged(request) | st.sampled_from([*history, b""]))
                if bad == request or rehearsal.server.stage is Stage.ADVERTISE:
                    continue  # a different configuration may be valid
                before = session.state
                with contextlib.suppress(ServerFaultError):
                    rehearsal.answer(client, bad, updates)
                    raise AssertionError(f"{bad.hex()} was taken for {request.hex()}")
                assert session.state is before
        history += set(requests.values())
        requests = rehearsal.exchange(requests, updates)
    result = rehearsal.server.result
    assert np.array_equal(result.sums["v"], plain_sum(updates, "v", result.survivors))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_damaged_configurations_are_taken_whole_or_refused(data: st.DataObject) -> None:
    rehearsal = Rehearsal.prepare([0] * 4, SEGMENTS)
    request = rehearsal.server.open()["client-0"]
    bad = data.draw(damaged(request) | st.binary(max_size=200))
    session = rehearsal.clients["client-0"]
    before = session.state
    try:
        rehearsal.answer("client-0", bad, {})
    except ServerFaultError:
        assert session.state is before
        assert session.log.of("rehearsal") == Served()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_damaged_answers_never_crash_the_server_and_never_spoil_the_sum_of_others(data: st.DataObject) -> None:
    """client-0 sends one damaged answer: it may be excluded for that, or the round may end without a sum."""
    rehearsal = Rehearsal.prepare([0] * 5, SEGMENTS)
    updates = random_updates(rehearsal.server.config)
    first = data.draw(st.sampled_from([Stage.ADVERTISE, Stage.SHARE, Stage.VOTE, Stage.UNMASK]))
    requests = rehearsal.until(first, updates)
    silent: set[str] = set()
    with contextlib.suppress(
        RoundAbortedError, ServerFaultError
    ):  # the latter if its encrypted share cannot be decrypted
        while requests:
            if "client-0" in requests and "client-0" not in silent and rehearsal.server.stage is not Stage.MASK:
                answer = rehearsal.answer("client-0", requests["client-0"], updates)
                with contextlib.suppress(ClientFaultError):
                    rehearsal.server.receive("client-0", data.draw(damaged(answer)))
                silent = {"client-0"}
                requests.pop("client-0")
            requests = rehearsal.exchange(requests, updates, silent)
        result = rehearsal.server.result
        assert np.array_equal(result.sums["v"], plain_sum(updates, "v", result.survivors))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_damaged_masked_inputs_are_taken_whole_or_leave_no_trace(data: st.DataObject) -> None:
    rehearsal = Rehearsal.prepare([0] * 4, SEGMENTS)
    updates = random_updates(rehearsal.server.config)
    requests = rehearsal.until(Stage.MASK, updates)
    answer = rehearsal.answer("client-0", requests.pop("client-0"), updates)
    try:
        rehearsal.server.receive("client-0", data.draw(damaged(answer)))
    except ClientFaultError:
        rehearsal.server.receive("client-0", answer)
        while requests:
            requests = rehearsal.exchange(requests, updates)
        assert np.array_equal(rehearsal.server.result.sums["v"], plain_sum(updates, "v", updates))
