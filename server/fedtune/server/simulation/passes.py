"""The passes of a simulation: which clients of a round a worker trains together, and the answers of all of them.

    passes = Passes(together=4)
    future = passes.submit(message, worker_of, start)   # start([messages of one pass], answered) -> its end
    answer_together(asked, handler, context, answered)  # in the worker; answered(index, answer) for each

An answer is handed on as soon as its client has made it: the server takes it in while the worker makes the next.

The clients of a round are cut into blocks of almost equal sizes, at most K, in the order of the round's first messages.
A block stays together for the round, so that the cut depends on the cohort alone, and not on the number of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from fedtune.client.rendezvous import Answered
from fedtune.core.errors import RunError
from fedtune.core.protocol.messages import TRAIN, Handler
from fedtune.core.spans import span
from fedtune.flower.envelope import WireMessage, answer_wire
from fedtune.flower.in_process_grid import Outgoing
from fedtune.server.simulation.simulation_context import SimulationContext

Start = Callable[[Sequence[Outgoing], Answered[WireMessage]], Future[None]]
"""(messages of one pass, told of each answer) -> done when all were told, or with the error that kept some from one."""


class Blocks:
    """The blocks of a round's clients.

    Args:
        together: K, the most clients of a block.
    """

    def __init__(self, together: int) -> None:
        self._together = together
        self._round = ""
        self._blocks: dict[int, tuple[int, ...]] = {}

    def of(self, message: Outgoing) -> tuple[int, ...]:
        """Returns the nodes of the block of a message's node, itself included."""
        if message.group != self._round:
            self._round, self._blocks = message.group, {}
        if message.node not in self._blocks:
            new = [node for node in dict.fromkeys([*message.beside, message.node]) if node not in self._blocks]
            for block in evenly(new, self._together):
                self._blocks.update(dict.fromkeys(block, block))
        return self._blocks[message.node]


def evenly(nodes: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Cuts nodes, in their order, into the fewest runs of at most `most`, whose sizes differ by at most 1."""
    count = -(-len(nodes) // most)
    ends = [len(nodes) * index // count for index in range(count + 1)] if count else []
    return [tuple(nodes[start:end]) for start, end in itertools.pairwise(ends)]


class Passes:
    """Holds back the messages that ask a block's clients to train until all of them are there.

    Args:
        together: K, the most clients in a pass.
    """

    def __init__(self, together: int) -> None:
        self.blocks = Blocks(together)
        self._waiting: dict[tuple[int, ...], list[tuple[Outgoing, Future[WireMessage]]]] = {}

    def submit(self, message: Outgoing, worker_of: Callable[[int], int | None], start: Start) -> Future[WireMessage]:
        """Returns the future of a message's answer; the last message of a pass starts it.

        Args:
            worker_of: node -> its worker, or None without one yet; nodes of different workers are in different passes.
            start: starts the messages of one pass.
        """
        future: Future[WireMessage] = Future()
        block = self.blocks.of(message)
        members: tuple[int, ...] = (message.node,)
        if message.action == TRAIN and len(block) > 1:
            worker, asked = worker_of(message.node), {*message.beside, message.node}
            members = tuple(node for node in block if node in asked and worker_of(node) == worker)
        waiting = self._waiting.setdefault(members, [])
        waiting.append((message, future))
        if len(waiting) == len(members):
            del self._waiting[members]
            futures = [each for _, each in waiting]
            start([each for each, _ in waiting], partial(_hand_out, futures)).add_done_callback(partial(_end, futures))
        return future


def _hand_out(futures: Sequence[Future[WireMessage]], index: int, answer: WireMessage | Exception) -> None:
    """Gives a future its answer."""
    if isinstance(answer, Exception):
        futures[index].set_exception(answer)
    else:
        futures[index].set_result(answer)


def _end(futures: Sequence[Future[WireMessage]], done: Future[None]) -> None:
    """Cancels the futures that have no answer, or gives them the error that kept them from one."""
    for future in (each for each in futures if not each.done()):
        if done.cancelled():
            future.cancel()
        else:
            future.set_exception(done.exception() or RunError("a pass ended without the answer of one of its clients"))


def answer_together(
    asked: Sequence[tuple[WireMessage, str]],
    handler: Handler,
    simulation_context: SimulationContext,
    answered: Answered[WireMessage],
) -> None:
    """Answers the messages of one pass by the clients' handler, so that all who train do it together.

    Args:
        asked: each message, and the client that it is for.
        simulation_context: has the trainer that the handler uses.
        answered: told of each answer as soon as it is there.
    """
    calls = [partial(_answer, wire, client, handler) for wire, client in asked]
    if len(calls) > 1:
        simulation_context.trainer.run(calls, answered)
        return
    answer: WireMessage | Exception
    try:
        answer = calls[0]()
    except Exception as error:  # a handler may raise any type
        answer = error
    answered(0, answer)


def _answer(wire: WireMessage, client: str, handler: Handler) -> WireMessage:
    with span("unpacking and packing", client):
        return answer_wire(wire, client, handler)
