"""The in-process grid, which implements Flower's Grid with Flower's own serialisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Timer
from typing import cast

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedtune.core.errors import PeerError
from fedtune.core.host.clock import Clock
from fedtune.core.job.settings import SimulationSettings
from fedtune.core.protocol.messages import EVALUATE, HEADER_BYTES, Handler, Request
from fedtune.flower.envelope import WireMessage, answer_wire, from_wire, seal, to_wire, unseal, unseal_parts
from fedtune.flower.in_process_grid import InProcessGrid, Outgoing
from fedtune.flower.strategy import stream_replies
from fedtune.server.simulation.faults import with_faults


class Threads:
    """An executor with several threads, whose clients are named like their nodes."""

    def __init__(self, handler: Handler, threads: int) -> None:
        self._handler = handler
        self._threads = ThreadPoolExecutor(threads)

    def submit(self, message: Outgoing) -> Future[WireMessage]:
        return self._threads.submit(lambda: answer_wire(message.pack(), str(message.node), self._handler))

    def close(self) -> None:
        self._threads.shutdown()


def echo(client: str, request: Request) -> bytes:
    """Sends the payload back reversed."""
    if client == "13" and request.action != EVALUATE:
        raise ValueError("thirteen")
    return request.parts[0][::-1]


@pytest.fixture
def grid() -> Iterator[InProcessGrid]:
    executor = Threads(echo, threads=3)
    yield InProcessGrid(executor, [11, 12, 13])
    executor.close()


def messages(grid: InProcessGrid, nodes: Sequence[int], payload: bytes = b"abc") -> list[Message]:
    return [grid.create_message(seal(payload), "train", node, "1") for node in nodes]


def test_every_message_gets_one_reply_from_its_node(grid: InProcessGrid) -> None:
    replies = list(stream_replies(grid, messages(grid, [11, 12]), deadline=None))
    assert sorted(reply.metadata.src_node_id for reply in replies) == [11, 12]
    assert [unseal(reply) for reply in replies] == [b"cba", b"cba"]


@pytest.mark.parametrize("seconds", [0.0, 0.05, 2.0, 60.0])
def test_a_reply_waits_for_at_most_a_tenth_of_the_time_that_it_took(grid: InProcessGrid, seconds: float) -> None:
    time, looks = [0.0], [0]
    clock = Clock(monotonic=lambda: time[0], sleep=lambda pause: time.append(time.pop() + pause))
    (answered,) = grid.send_and_receive(messages(grid, [11]))

    class Slow:
        def push_messages(self, sent: Sequence[Message]) -> list[str]:
            return [answered.metadata.reply_to_message_id]

        def pull_messages(self, ids: Sequence[str]) -> list[Message]:
            looks[0] += 1
            return [answered] if time[0] >= seconds else []

    assert len(list(stream_replies(cast(Grid, Slow()), [], None, clock=clock))) == 1
    assert seconds <= time[0] <= 1.1 * seconds + 0.001
    assert looks[0] <= 2 + 4 * seconds + 80


def test_a_simulation_s_grid_is_looked_at_only_when_a_reply_is_there() -> None:
    answers: dict[int, Future[WireMessage]] = {node: Future() for node in (11, 12)}

    class Promises:
        def submit(self, message: Outgoing) -> Future[WireMessage]:
            def answer(node: int) -> None:
                answers[node].set_result(answer_wire(message.pack(), str(node), echo))

            Timer(0.3 * (message.node - 10), answer, [message.node]).start()
            return answers[message.node]

    looks = []

    class Looked(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            looks.append(len(list(message_ids)))
            return super().pull_messages(message_ids)

    grid = Looked(Promises(), [11, 12])
    replies = [reply.metadata.src_node_id for reply in stream_replies(grid, messages(grid, [11, 12]), deadline=None)]
    assert replies == [11, 12]
    assert len(looks) < 10, "0.6 seconds are three of the longest waits"


def test_a_client_that_raises_is_an_error_reply_and_not_a_crash(grid: InProcessGrid) -> None:
    (reply,) = grid.send_and_receive(messages(grid, [13]))
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    with pytest.raises(PeerError, match="no answer: ValueError: thirteen"):
        unseal(reply)


def test_a_reply_larger_than_its_request_could_give_is_an_error_and_a_bound_says_what_it_could(
    grid: InProcessGrid,
) -> None:
    for size, fits in ((HEADER_BYTES, True), (2 * HEADER_BYTES, False)):
        (reply,) = grid.send_and_receive(messages(grid, [11], bytes(size)))
        assert reply.has_content() == fits
    assert "more than the" in str(reply.error.reason)
    grid.bound_replies("train", 2 * HEADER_BYTES)
    (reply,) = grid.send_and_receive(messages(grid, [11], bytes(2 * HEADER_BYTES)))
    assert len(unseal(reply)) == 2 * HEADER_BYTES


def test_a_reply_is_pulled_once(grid: InProcessGrid) -> None:
    ids = list(grid.push_messages(messages(grid, [11])))
    replies: list[Message] = []
    while not replies:
        replies = list(grid.pull_messages(ids))
    assert list(grid.pull_messages(ids)) == []
    assert list(grid.pull_messages(["never-sent"])) == []


def test_a_message_crosses_the_wire_unchanged_and_unshared(grid: InProcessGrid) -> None:
    (message,) = messages(grid, [11], payload=bytes(range(256)))
    copy = from_wire(to_wire(message))
    assert unseal(copy) == bytes(range(256))
    assert copy.metadata.dst_node_id == 11
    assert copy.content is not message.content


@pytest.mark.parametrize("content", [RecordDict(), seal(b"x")])
def test_an_envelope_with_anything_else_in_it_is_refused(grid: InProcessGrid, content: RecordDict) -> None:
    message = grid.create_message(content, "train", 11, "1")
    if content:
        message.content["more"] = seal(b"y")["fedtune"]
    with pytest.raises(PeerError, match="expected one named fedtune of 1 parts"):
        unseal(message)


def test_a_message_has_two_parts_where_its_reader_expects_two(grid: InProcessGrid) -> None:
    message = grid.create_message(seal(b"for you", b"for all"), "query.open", 11, "1")
    assert unseal_parts(from_wire(to_wire(message)), 2) == (b"for you", b"for all")
    with pytest.raises(PeerError, match="expected one named fedtune of 1 parts"):
        unseal(message)


def test_an_empty_payload_is_a_payload(grid: InProcessGrid) -> None:
    assert unseal(grid.create_message(seal(b""), "train", 11, "1")) == b""


def test_injected_faults_follow_from_the_seed_and_spare_evaluation() -> None:
    def outcomes(seed: int, kind: str = "train") -> list[str]:
        settings = SimulationSettings(dropout=0.4, failing=0.4)
        executor = Threads(with_faults(echo, settings, seed, secure=False), threads=1)
        grid = InProcessGrid(executor, range(20))
        replies = grid.send_and_receive([grid.create_message(seal(b""), kind, node, "1") for node in range(20)])
        executor.close()
        return [str(reply.error.reason).split(":")[0] if reply.has_error() else "answered" for reply in replies]

    assert outcomes(0) == outcomes(0) != outcomes(1)
    assert set(outcomes(0)) == {"VanishedError", "InjectedError", "answered"}
    assert set(outcomes(0, "evaluate")) == {"answered"}
