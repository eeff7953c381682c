"""Whole rounds: the sum is exact for every pattern of dropouts up to the limit, and one more aborts cleanly."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rehearsal import Rehearsal, Update, enrol, plain_sum, random_updates

from fedtune.core.errors import JobError, UpdateError
from fedtune.core.secagg import (
    Assumptions,
    ClientFaultError,
    OpenedSum,
    Policy,
    RoundAbortedError,
    RoundMark,
    Segment,
    ServerFaultError,
    Stage,
    Subject,
    client_session,
    graph,
    round_config,
)
from fedtune.core.secagg.client_session import EXCHANGES as CLIENT
from fedtune.core.secagg.client_session import ClientSession, Ended, Idle, Masked, State
from fedtune.core.secagg.exchanged import (
    Delivery,
    KeyList,
    Member,
    Message,
    Quorum,
    Reveal,
    RoundConfig,
    Survivors,
    decode,
    encode,
)
from fedtune.core.secagg.primitives import Secret
from fedtune.core.secagg.server_session import EXCHANGES as SERVER

PLAIN = (Segment("v", 7, 8, 15, (0,)), Segment("weight", 1, 32, 1 << 20, (0,)))
TIERED = (
    Segment("small", 5, 12, 99, (0,)),
    Segment("large", 33, 17, 1000, (1,)),
    Segment("count", 1, 62, 1 << 50, (0, 1)),
    Segment("empty", 0, 8, 1, (1,)),
)
SPARSE = {"degree": 10, "threshold": 6, "quorum": 13, "minimum": 21}  # safe for 24 clients if none colludes
ASKING = (Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.VOTE, Stage.UNMASK)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_sum_is_exact_for_any_tiers_and_any_dropouts_up_to_the_limit(data: st.DataObject) -> None:
    tiers = data.draw(st.lists(st.integers(0, 1), min_size=4, max_size=12).filter(lambda t: set(t) == {0, 1}), "tiers")
    rehearsal = Rehearsal.prepare(tiers, TIERED)
    config = rehearsal.server.config
    keepers = {tiers.index(0), tiers.index(1)}  # a tier that vanishes as a whole has no sum
    leavers = data.draw(
        st.lists(
            st.sampled_from([index for index in range(len(tiers)) if index not in keepers]),
            max_size=len(tiers) - config.minimum,
            unique=True,
        ),
        "leavers",
    )
    silent: dict[Stage, set[str]] = {stage: set() for stage in ASKING}
    for index in leavers:
        silent[data.draw(st.sampled_from(ASKING), "when")].add(f"client-{index}")
    updates = random_updates(config, seed=len(leavers))
    result = rehearsal.run(updates, silent)
    gone = silent[Stage.ADVERTISE] | silent[Stage.SHARE] | silent[Stage.MASK]
    assert set(result.survivors) == {member.client for member in config.cohort} - gone
    assert set(result.dropouts) == gone
    assert_exact(result, updates)


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 16, 17, 31, 32, 33, 62])
def test_the_sum_is_exact_in_every_width_of_ring(bits: int) -> None:
    limit = max(0, (1 << bits) // 5 - 1)
    rehearsal = Rehearsal.prepare([0] * 5, [Segment("v", 65, bits, limit, (0,))])
    updates = random_updates(rehearsal.server.config)
    result = rehearsal.run(updates, {Stage.MASK: {"client-2"}})
    assert result.sums["v"].dtype == (np.uint32 if bits <= 32 else np.uint64)
    assert_exact(result, updates)


def test_the_greatest_words_of_everybody_do_not_wrap_around() -> None:
    rehearsal = Rehearsal.prepare([0] * 4, [Segment("v", 3, 6, 15, (0,))])
    updates = {f"client-{i}": {"v": np.full(3, 15, np.uint32)} for i in range(4)}
    assert rehearsal.run(updates).sums["v"].tolist() == [60, 60, 60]


def test_the_sum_is_exact_on_a_sparse_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "COMPLETE_UP_TO", 20)
    config = msgspec.structs.replace(Rehearsal.prepare([i % 2 for i in range(24)], TIERED).server.config, **SPARSE)
    identities, roster = enrol(member.client for member in config.cohort)
    rehearsal = Rehearsal.start(config, identities, roster, policy=Policy(0.0, 2, 1, 0))
    updates = random_updates(config)
    result = rehearsal.run(
        updates, {Stage.SHARE: {"client-3"}, Stage.MASK: {"client-0", "client-9"}, Stage.UNMASK: {"client-7"}}
    )
    assert len(result.survivors) == 21
    assert_exact(result, updates)


def test_a_sparse_round_without_a_quorum_of_votes_aborts_even_if_its_shares_would_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph, "COMPLETE_UP_TO", 20)
    roomy = [Segment("v", 7, 16, 15, (0,))]
    config = msgspec.structs.replace(Rehearsal.prepare([0] * 24, roomy).server.config, **SPARSE)
    identities, roster = enrol(member.client for member in config.cohort)
    rehearsal = Rehearsal.start(config, identities, roster, policy=Policy(0.0, 2, 1, 0))
    with pytest.raises(RoundAbortedError, match="12 clients voted, expected at least 13"):
        rehearsal.run(random_updates(config), {Stage.VOTE: {f"client-{index}" for index in range(12)}})


@pytest.mark.parametrize("stage", ASKING)
def test_one_dropout_more_than_the_limit_aborts_and_the_next_round_runs(stage: Stage) -> None:
    rehearsal = Rehearsal.prepare([0] * 10, PLAIN, max_dropout=0.4)  # so that minimum = quorum = threshold = 6
    updates = random_updates(rehearsal.server.config)
    limit = {f"client-{i}" for i in range(4)}
    with pytest.raises(RoundAbortedError, match="expected at least 6"):
        rehearsal.run(updates, {stage: limit | {"client-9"}})
    assert rehearsal.server.stage is Stage.ABORTED
    again = Rehearsal.prepare([0] * 10, PLAIN, max_dropout=0.4, mark=RoundMark(1, 1))
    assert_exact(again.run(updates, {stage: limit}), updates)


def test_a_tier_below_its_minimum_aborts_the_round() -> None:
    rehearsal = Rehearsal.prepare([0, 0, 0, 0, 0, 0, 0, 1], TIERED)
    with pytest.raises(RoundAbortedError, match="0 clients in tier 1"):
        rehearsal.run(random_updates(rehearsal.server.config), {Stage.MASK: {"client-7"}})


def test_wrong_shares_of_a_survivor_are_corrected_and_it_is_named() -> None:
    rehearsal = Rehearsal.prepare([0] * 8, PLAIN)
    updates = random_updates(rehearsal.server.config)
    requests = rehearsal.until(Stage.UNMASK, updates, {Stage.MASK: {"client-7"}})
    for client, request in requests.items():
        reply = rehearsal.answer(client, request, updates)
        if client == "client-0":
            honest = decode(reply, Reveal, 1 << 20)
            reply = encode(Reveal(honest.config, bytes(len(honest.shares))))
        rehearsal.server.receive(client, reply)
    assert rehearsal.server.advance() == {}
    assert rehearsal.server.result.liars == ("client-0",)
    assert_exact(rehearsal.server.result, updates)


def test_two_rounds_with_the_same_update_never_share_a_mask() -> None:
    sent = []
    for number in (1, 2):
        rehearsal = Rehearsal.prepare([0] * 4, [Segment("v", 4096, 16, 0, (0,))], mark=RoundMark(number, 0))
        updates = random_updates(rehearsal.server.config)
        requests = rehearsal.until(Stage.MASK, updates)
        sent += [rehearsal.answer(client, request, updates) for client, request in requests.items()]
    words = [np.frombuffer(reply[-8192:], dtype="<u2") for reply in sent]
    for i, one in enumerate(words):
        for other in words[:i]:
            assert np.count_nonzero(one == other) < 10  # 0.06 expected of independent noise


def test_a_masked_update_looks_uniform_whatever_is_in_it() -> None:
    rehearsal = Rehearsal.prepare([0] * 4, [Segment("v", 1 << 16, 8, 63, (0,))])
    updates: dict[str, Update] = {f"client-{i}": {"v": np.full(1 << 16, 63, np.uint32)} for i in range(4)}
    requests = rehearsal.until(Stage.MASK, updates)
    masked = np.frombuffer(rehearsal.answer("client-0", requests["client-0"], updates)[-(1 << 16) :], dtype=np.uint8)
    counts = np.bincount(masked, minlength=256)
    chi_square = float(((counts - 256.0) ** 2 / 256.0).sum())
    assert chi_square < 255 + 8 * np.sqrt(2 * 255)  # exceeded once in about 10^12 runs


def test_a_client_carries_a_secret_no_further_than_it_needs_it() -> None:
    rehearsal = Rehearsal.prepare([0] * 4, PLAIN)
    session = rehearsal.clients["client-0"]
    updates = random_updates(rehearsal.server.config)
    seen: list[Secret] = []
    requests = rehearsal.server.open()
    while requests:
        requests = rehearsal.exchange(requests, updates)
        held = list(session.state.secrets())
        assert all(secret.wiped for secret in seen if secret not in held)
        assert not any(secret.wiped for secret in held)
        seen += held
    assert len(seen) > 10
    assert all(secret.wiped for secret in seen)


def test_secrets_are_gone_from_memory_after_the_session() -> None:
    rehearsal = Rehearsal.prepare([0] * 4, PLAIN)
    updates = random_updates(rehearsal.server.config)
    requests = rehearsal.until(Stage.SHARE, updates)
    seeds = [secret.value for secret in rehearsal.clients["client-0"].state.secrets()]
    while requests:
        requests = rehearsal.exchange(requests, updates)
    gc.collect()
    # By type and not isinstance, which would resolve every lazy proxy in the process.
    reachable = [o for o in gc.get_objects() if type(o) is Secret]
    assert not any(not secret.wiped and secret.value in seeds for secret in reachable)
    assert all(isinstance(session.state, Ended) for session in rehearsal.clients.values())


def test_closing_a_session_wipes_it_at_any_point() -> None:
    rehearsal = Rehearsal.prepare([0] * 4, PLAIN)
    updates = random_updates(rehearsal.server.config)
    for stage, client in zip(ASKING[1:], rehearsal.clients, strict=True):
        (fresh := Rehearsal.prepare([0] * 4, PLAIN)).until(stage, updates)
        held = list(fresh.clients[client].state.secrets())
        fresh.clients[client].close()
        assert held
        assert all(secret.wiped for secret in held)


def test_no_secret_shows_in_the_repr_of_a_session() -> None:
    rehearsal = Rehearsal.prepare([0] * 4, PLAIN)
    rehearsal.until(Stage.VOTE, random_updates(rehearsal.server.config))
    session = rehearsal.clients["client-0"]
    shown = repr(session) + repr(session.state)
    assert not any(secret.value.hex() in shown or repr(secret.value) in shown for secret in session.state.secrets())


@pytest.mark.parametrize("state", [*CLIENT, Ended])
@pytest.mark.parametrize("kind", [exchange.message for exchange in CLIENT.values()])
def test_a_client_accepts_in_each_state_what_its_table_says_and_nothing_else(
    state: type[State], kind: type[Message]
) -> None:
    rehearsal, seen = Rehearsal.prepare([0] * 4, PLAIN), {}
    updates = random_updates(rehearsal.server.config)
    session, requests = rehearsal.clients["client-0"], rehearsal.server.open()
    for exchange in list(CLIENT.values()):
        if type(session.state) is state:
            break
        seen[exchange.message] = requests["client-0"]
        requests = rehearsal.exchange(requests, updates)
    before = session.state
    assert type(before) is state
    if state in CLIENT and CLIENT[state].message is kind:
        step(session, rehearsal, updates, kind, requests["client-0"])
        assert type(session.state) is CLIENT[state].after
        return
    with pytest.raises(ServerFaultError, match="out of order"):
        step(session, rehearsal, updates, kind, seen.get(kind, b""))
    assert session.state is before
    while requests:
        requests = rehearsal.exchange(requests, updates)  # and the round still goes on


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("kind", [exchange.message for exchange in SERVER.values()])
def test_the_server_accepts_at_each_stage_what_its_table_says_and_nothing_else(
    stage: Stage, kind: type[Message]
) -> None:
    rehearsal = Rehearsal.prepare([0] * 4, PLAIN)
    server, updates = rehearsal.server, random_updates(rehearsal.server.config)
    replies: dict[type[Message], bytes] = {}
    requests: dict[str, bytes] = {}
    while server.stage is not stage:
        if server.stage is Stage.NEW:
            requests = server.open()
        elif stage is Stage.ABORTED:
            with pytest.raises(RoundAbortedError):
                server.advance()
        else:
            row = SERVER[server.stage]
            for client, request in requests.items():
                replies[row.message] = reply = rehearsal.answer(client, request, updates)
                server.receive(client, reply)
            requests = server.advance()
            assert server.stage is row.after
    if stage in SERVER and SERVER[stage].message is kind:
        server.receive("client-3", rehearsal.answer("client-3", requests["client-3"], updates))
        return
    with pytest.raises(ClientFaultError):
        server.receive("client-3", replies.get(kind, b""))
    assert server.stage is stage
    if stage not in SERVER:
        with pytest.raises(ClientFaultError, match="nothing is asked of it"):
            server.receive("client-3", b"")
        if stage is not Stage.NEW:
            with pytest.raises(RoundAbortedError, match="nothing to end"):
                server.advance()


def test_a_client_whose_table_has_no_row_for_a_state_accepts_nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = Rehearsal.prepare([0] * 4, PLAIN)
    requests = rehearsal.until(Stage.VOTE, random_updates(rehearsal.server.config))
    session = rehearsal.clients["client-0"]
    rest = {state: exchange for state, exchange in CLIENT.items() if state is not Masked}
    monkeypatch.setattr(client_session, "EXCHANGES", rest)
    with pytest.raises(ServerFaultError, match="Survivors came out of order: this client is masked"):
        session.vote(requests["client-0"])
    assert type(session.state) is Masked


def test_a_client_whose_table_names_another_message_takes_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = Rehearsal.prepare([0] * 4, PLAIN)
    requests = rehearsal.until(Stage.VOTE, random_updates(rehearsal.server.config))
    session = rehearsal.clients["client-0"]
    monkeypatch.setitem(CLIENT, Masked, replace(CLIENT[Masked], message=Quorum))
    with pytest.raises(ServerFaultError, match="Survivors came out of order"):
        session.vote(requests["client-0"])
    with pytest.raises(ServerFaultError, match="Quorum: Expected `array`"):  # accepted as one, and then decoded
        session.unmask(requests["client-0"])


def test_a_client_goes_nowhere_but_where_its_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = Rehearsal.prepare([0] * 4, PLAIN)
    requests = rehearsal.until(Stage.VOTE, random_updates(rehearsal.server.config))
    session = rehearsal.clients["client-0"]
    monkeypatch.setitem(CLIENT, Masked, replace(CLIENT[Masked], after=Ended))
    with pytest.raises(TypeError, match="Survivors leads to Voted; the table says Ended"):
        session.vote(requests["client-0"])
    assert type(session.state) is Masked


def test_the_server_goes_where_its_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = Rehearsal.prepare([0] * 4, PLAIN)
    updates = random_updates(rehearsal.server.config)
    requests = rehearsal.until(Stage.VOTE, updates)
    monkeypatch.setitem(SERVER, Stage.VOTE, replace(SERVER[Stage.VOTE], after=Stage.DONE))
    rehearsal.exchange(requests, updates)
    assert rehearsal.server.stage is Stage.DONE


def test_the_exchanges_are_one_chain_from_idle_to_ended() -> None:
    state: type[State] = Idle
    visited: list[type[Message]] = []
    while state is not Ended:
        visited.append(CLIENT[state].message)
        state = CLIENT[state].after
    assert [kind.__name__ for kind in visited] == ["RoundConfig", "KeyList", "Delivery", "Survivors", "Quorum"]
    stage, answered = Stage.ADVERTISE, []
    while stage is not Stage.DONE:
        answered.append(SERVER[stage].message)
        stage = SERVER[stage].after
    assert [kind.__name__ for kind in answered] == ["Advertisement", "EncryptedShares", "MaskedInput", "Vote", "Reveal"]


@pytest.mark.parametrize(
    ("update", "complaint"),
    [
        ({"v": np.zeros(7, np.uint32)}, "segments"),
        ({"v": np.zeros(8, np.uint32), "weight": np.zeros(1, np.uint32)}, "expected 7"),
        ({"v": np.zeros(7, np.int64), "weight": np.zeros(1, np.uint32)}, "unsigned"),
        ({"v": np.full(7, 16, np.uint32), "weight": np.zeros(1, np.uint32)}, "above the limit"),
        ({"v": np.zeros((7, 1), np.uint32), "weight": np.zeros(1, np.uint32)}, "expected 7"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_and_another_may_follow(update: Update, complaint: str) -> None:
    rehearsal = Rehearsal.prepare([0] * 4, PLAIN)
    updates = random_updates(rehearsal.server.config)
    requests = rehearsal.until(Stage.MASK, updates)
    with pytest.raises(UpdateError, match=complaint):
        rehearsal.clients["client-0"].mask(requests["client-0"], update)
    while requests:
        requests = rehearsal.exchange(requests, updates)
    assert_exact(rehearsal.server.result, updates)


def test_the_callers_update_is_not_changed_by_masking() -> None:
    rehearsal = Rehearsal.prepare([0] * 4, [Segment("v", 64, 8, 15, (0,))])
    updates: dict[str, Update] = {f"client-{i}": {"v": np.full(64, i, np.uint8)} for i in range(4)}
    rehearsal.run(updates)
    assert all((update["v"] == i).all() for i, update in enumerate(updates.values()))


@pytest.mark.parametrize(
    ("tiers", "segments", "complaint"),
    [
        ([0] * 5, [Segment("v", 1, 6, 15, (0,))], "overflow 6 bits"),
        ([0] * 5, [Segment("v", 1, 8, 15, (0,)), Segment("v", 1, 8, 15, (0,))], "same name"),
        ([0] * 5, [Segment("v", 1, 8, 15, (1,))], "tiers must be"),
        ([0] * 5, [Segment("v", 1, 8, 15, (0, 0))], "tiers must be"),
        ([0], [Segment("v", 1, 8, 15, (0,))], "at least 2 clients"),
    ],
)
def test_a_round_that_cannot_be_right_is_refused_when_it_is_made(
    tiers: list[int], segments: list[Segment], complaint: str
) -> None:
    with pytest.raises(JobError, match=complaint):
        Rehearsal.prepare(tiers, segments)


def test_a_client_invited_twice_is_refused_when_the_round_is_made() -> None:
    with pytest.raises(JobError, match="invited twice"):
        round_config(
            Subject("j", RoundMark(1, 0), "0" * 64, "0" * 64),
            [Member("a", 0), Member("b", 0), Member("a", 0), Member("c", 0)],
            PLAIN,
            Assumptions(0.1, 0.0),
        )


def assert_exact(result: OpenedSum, updates: Mapping[str, Update]) -> None:
    for name, got in result.sums.items():
        carriers = [client for client in result.survivors if name in updates[client]]
        assert result.contributors[name] == len(carriers)
        assert np.array_equal(got, plain_sum(updates, name, carriers)), name


def step(
    session: ClientSession, rehearsal: Rehearsal, updates: Mapping[str, Update], kind: type[Message], message: bytes
) -> bytes:
    """Calls the client's step for this kind of message."""
    config = rehearsal.server.config
    if kind is RoundConfig:
        return session.advertise(message, base_digest=config.base_digest, adapter_digest=config.adapter_digest)
    if kind is Delivery:
        return session.mask(message, updates["client-0"])
    steps = {KeyList: session.share, Survivors: session.vote, Quorum: session.unmask}
    return steps[kind](message)
