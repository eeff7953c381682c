"""Federated training of one adapter as a Flower Strategy, usable in any ServerApp:

    strategy = AdapterStrategy(assemble(job, base, layout))
    result = strategy.start(grid, strategy.initial_arrays(), num_rounds=20)

fedtune's own server drives it round by round, state in and state out, so that it can store each acknowledged round:

    for state, record in strategy.rounds(grid, state, last_round=20, evaluate=evaluate): ...

`fedtune.strategies.round` implements a round; this module connects it to Flower's grid and messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedtune.core.adapter.layout import AdapterLayout, Vector
from fedtune.core.codec.uplink import Compression
from fedtune.core.errors import JobError, PeerError, RunError
from fedtune.core.host.clock import SYSTEM_CLOCK, Clock
from fedtune.core.round_records import ClientRecord, Evaluation, RoundRecord
from fedtune.core.spans import ROUND, span
from fedtune.flower.envelope import seal, unseal
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.collection import Exchange
from fedtune.strategies.evaluation_round import EvaluationRound, clients_evaluate, pooled
from fedtune.strategies.federation import Federation, FederationState, initial_state
from fedtune.strategies.round import TrainingRound
from fedtune.strategies.schedule import Closing

ADAPTER = "adapter"  # the only array in the ArrayRecords of Flower's interface

Evaluate = Callable[[int, Vector], Evaluation | None]
Roster = Callable[[Grid], dict[str, int]]


def roster_by_node_id(grid: Grid) -> dict[str, int]:
    """Names clients by their Flower node, where no other names are known."""
    return {str(node_id): node_id for node_id in grid.get_node_ids()}


class AdapterStrategy(Strategy):
    """Federated training of one adapter.

    Args:
        federation: parts that stay the same throughout the job.
        roster: client name -> Flower node, of the clients that can be reached now.
        stale_updates: returns the answers that arrived after their round had closed; called at the end of each round.
        bound_replies: told, before an exchange, its message type and the most bytes that an honest answer can have.
    """

    def __init__(
        self,
        federation: Federation,
        roster: Roster = roster_by_node_id,
        stale_updates: Callable[[], Iterable[Message]] = tuple,
        bound_replies: Callable[[str, int], None] = lambda *_: None,
    ) -> None:
        self.federation = federation
        self.roster = roster
        self.stale_updates = stale_updates
        self.bound_replies = bound_replies
        job, layout = federation.job, federation.layout
        bits = Compression.of(job).downlink_bits
        self._broadcast = Broadcast(layout, layout.initial(federation.terms.seed), bits)
        self._state = initial_state(federation)
        self._training: TrainingRound | None = None
        self._evaluation: EvaluationRound | None = None
        self._names: dict[int, str] = {}

    def initial_arrays(self) -> ArrayRecord:
        """Returns the adapter before round 1 in the form that `start` takes."""
        return _to_arrays(initial_state(self.federation).adapter)

    def rounds(
        self,
        grid: Grid,
        state: FederationState,
        last_round: int,
        evaluate: Evaluate | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[FederationState, RoundRecord]]:
        """Runs the rounds after `state.round` up to `last_round`, yielding each one's state and record as it ends.

        Trackers receive a round's record once the caller asks for the next round, and so has stored this one.

        Args:
            stop: asked before each round; True ends the rounds.
        """
        for number in range(state.round + 1, last_round + 1):
            if stop():
                return
            with span(ROUND, str(number)):
                state, record = self._round(grid, state)
                if evaluate is not None:
                    record = replace(record, eval=evaluate(number, state.adapter))
                yield state, record
                for tracker in self.federation.trackers:
                    tracker.round(record)

    def _round(self, grid: Grid, state: FederationState) -> tuple[FederationState, RoundRecord]:
        """Runs the round after a state, and the clients' evaluation where it is due."""
        roster = self.roster(grid)
        training = self._open(state, self._trainable(roster))
        self._run(grid, training, roster)
        names = {node_id: name for name, node_id in roster.items()}
        for reply in self.stale_updates():
            with suppress(KeyError, PeerError):  # ignores errors, and answers of nodes that are gone
                training.take_stale(names[reply.metadata.src_node_id], unseal(reply))
        state, record = training.close()
        self.remember(record.round, record.clients)
        if clients_evaluate(self.federation.job, record.round):
            with span("evaluation by clients"):
                evaluation = EvaluationRound.open(self.federation, state, sorted(roster), self._broadcast)
                self._run(grid, evaluation, roster)
                record = replace(record, client_evaluations=evaluation.close())
        return state, record

    def remember(self, number: int, clients: Sequence[ClientRecord]) -> None:
        """Updates the selection by a round's records; a resumed run passes its earlier rounds in order."""
        self.federation = replace(self.federation, selection=self.federation.selection.learned(number, clients))

    def _open(self, state: FederationState, population: Sequence[str]) -> TrainingRound:
        return TrainingRound.open(self.federation, state, population, self._broadcast)

    def _trainable(self, roster: dict[str, int]) -> list[str]:
        """Returns the clients that can be asked to train: under secure aggregation, those with pinned identity keys."""
        return sorted(name for name in roster if self.federation.collector.admits(name))

    def _run(self, grid: Grid, round_: TrainingRound | EvaluationRound, roster: dict[str, int]) -> None:
        deadline = self.federation.job.federation.deadline
        names = {node_id: name for name, node_id in roster.items()}
        for exchange in round_.exchanges():
            self.bound_replies(exchange.message_type, exchange.reply_bytes)
            with span("packing requests"):
                messages = _messages(exchange, roster, round_.number)
            seconds = None if deadline == "auto" else deadline
            _collect(round_, stream_replies(grid, messages, seconds, exchange.closing), names)

    # -- Flower's interface, for a ServerApp that drives the rounds itself -------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns one request, the same for the whole cohort; `config` is ignored in favour of the job.

        Raises:
            JobError: secure aggregation takes five exchanges a round, and this interface has one.
        """
        del config
        if not self.federation.collector.single_exchange:
            raise JobError(["secure aggregation needs AdapterStrategy.start or .rounds to drive the rounds"])
        roster = self.roster(grid)
        state = replace(self._take_over(arrays), round=server_round - 1)
        self._training = self._open(state, sorted(roster))
        self._names = {node_id: name for name, node_id in roster.items()}
        return _messages(next(self._training.exchanges()), roster, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Takes the replies as they arrive; returns None where too few clients survived."""
        if self._training is None or self._training.number != server_round:
            raise RuntimeError(f"aggregate_train({server_round}) without configure_train({server_round}) before it")
        _collect(self._training, replies, self._names)
        self._state, record = self._training.close()
        self.remember(record.round, record.clients)
        if record.aborted:
            return None, None
        return _to_arrays(self._state.adapter), _train_metrics(record)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns a request to every client that can be reached, in rounds in which the job lets clients evaluate."""
        del config
        self._evaluation = None
        if not clients_evaluate(self.federation.job, server_round):
            return []
        roster = self.roster(grid)
        state = replace(self._take_over(arrays), round=server_round)
        self._evaluation = EvaluationRound.open(self.federation, state, sorted(roster), self._broadcast)
        self._names = {node_id: name for name, node_id in roster.items()}
        return _messages(next(self._evaluation.exchanges()), roster, server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Returns the pooled score of all clients."""
        if self._evaluation is None or self._evaluation.number != server_round:
            return None
        _collect(self._evaluation, replies, self._names)
        score = pooled(self._evaluation.close())
        return _evaluate_metrics(score) if score else None

    def summary(self) -> None:
        """Prints nothing; fedtune's own output has the summary."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Runs Flower's whole loop on top of `rounds`, which streams replies instead of holding them all.

        `timeout` and the configs are ignored; the job's deadline and settings apply.
        """
        del timeout, train_config, evaluate_config
        result = Result()
        if evaluate_fn and (metrics := evaluate_fn(0, initial_arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = metrics
        state = self._take_over(initial_arrays)
        for after, record in self.rounds(grid, state, num_rounds):
            result.arrays = _to_arrays(after.adapter)
            if not record.aborted:
                result.train_metrics_clientapp[record.round] = _train_metrics(record)
            if score := pooled(record.client_evaluations):
                result.evaluate_metrics_clientapp[record.round] = _evaluate_metrics(score)
            if evaluate_fn and (metrics := evaluate_fn(record.round, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[record.round] = metrics
        return result

    def _take_over(self, arrays: ArrayRecord) -> FederationState:
        """Returns the state so far, with the adapter from the ServerApp as the one that devices receive."""
        adapter = _from_arrays(arrays, self.federation.layout)
        if np.array_equal(adapter, self._state.adapter):
            return self._state
        return replace(self._state, adapter=adapter, held=self._broadcast.to_hold(adapter))


def _messages(exchange: Exchange, roster: dict[str, int], number: int) -> Sequence[Message]:
    contents: dict[tuple[bytes, ...], RecordDict] = {}  # clients with equal requests share one
    messages = []
    if unknown := exchange.requests.keys() - roster.keys():
        raise RunError(f"the selection has chosen clients that are not there: {', '.join(sorted(unknown))}")
    for name, parts in exchange.requests.items():
        if parts not in contents:
            contents[parts] = seal(*parts)
        messages.append(Message(contents[parts], roster[name], exchange.message_type, group_id=str(number)))
    return messages


def _collect(round_: TrainingRound | EvaluationRound, replies: Iterable[Message], names: dict[int, str]) -> None:
    for reply in replies:
        name = names.get(reply.metadata.src_node_id)
        if name is None:
            continue
        try:
            payload = unseal(reply)
        except PeerError as error:
            round_.give_up(name, str(error))
        else:
            with span("taking in answers", name):
                round_.take_in(name, payload)


def _train_metrics(record: RoundRecord) -> MetricRecord:
    return MetricRecord({"train-loss": record.train_loss or 0.0, "survivors": len(record.survivors)})


def _evaluate_metrics(score: Evaluation) -> MetricRecord:
    return MetricRecord({"loss": score.loss, "exact-match": score.exact_match, "num-examples": score.examples})


def _to_arrays(adapter: Vector) -> ArrayRecord:
    return ArrayRecord({ADAPTER: Array(np.ascontiguousarray(adapter))})


def _from_arrays(arrays: ArrayRecord, layout: AdapterLayout) -> Vector:
    vector = arrays[ADAPTER].numpy()
    layout.check(vector)
    return vector


SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.25  # seconds between two looks for replies
PAUSE_SHARE = 0.1  # of the time since the last reply; so much is lost at most between a reply and its use


def stream_replies(
    grid: Grid,
    messages: Iterable[Message],
    deadline: float | None,
    closing: Closing | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Iterator[Message]:
    """Sends the messages and yields their replies in order of arrival, each once, so that only one is held at a time.

    Flower's `Grid.send_and_receive` returns with the last reply, holding them all, and sleeps 3 s between polls. A grid
    that has `wait_for_reply`, as that of a simulation, is not polled.

    Args:
        grid: grid to send them through.
        messages: messages, each to one node.
        deadline: seconds to wait for the last reply, or None to wait for all.
        closing: condition to stop before all replies have arrived; errors do not count as answers.
    """
    started, answers = clock.monotonic(), 0
    end = math.inf if deadline is None else started + deadline
    with span("sending"):
        waiting = {message_id for message_id in grid.push_messages(messages) if message_id}
    last_reply = started
    while waiting and clock.monotonic() < end:
        arrived = list(grid.pull_messages(list(waiting)))
        waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
        answers += sum(not reply.has_error() for reply in arrived)
        yield from arrived
        if closing and (answers >= closing.enough or _is_late(closing, clock.monotonic() - started, answers)):
            return
        if arrived:
            last_reply = clock.monotonic()
            continue
        with span("waiting for clients"):
            if hasattr(grid, "wait_for_reply"):
                grid.wait_for_reply(waiting, min(LONGEST_PAUSE, max(0.0, end - clock.monotonic())))
            else:
                pause = max(SHORTEST_PAUSE, PAUSE_SHARE * (clock.monotonic() - last_reply))
                clock.sleep(min(pause, LONGEST_PAUSE))


def _is_late(closing: Closing, seconds: float, answers: int) -> bool:
    return answers >= closing.least and seconds >= closing.seconds
