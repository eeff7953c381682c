"""The counting of a round's work: operations and tokens from the job, seconds from a clock, joules from a meter.

    counter = WorkCounter(job, flops, lengths, meter)
    record = counter.counted(record)                # before the round is stored; its work is since the last call

Wall-clock time is shared out by what is known: a round's training lasts until its last update has arrived, its
aggregation from then on until it closes, and the time between rounds is evaluation's where anything was scored. Joules
are shared like seconds, since a machine draws power for as long as it is at work, whatever it computes. The clients of
all tiers train at the same time, so among tiers training's seconds and joules are shared like operations.

A device does not say how many tokens it computed. They follow from the job's steps and the budget of each, into which
one more example would not fit; in the clear a client's number of examples bounds a step as well. Examples are as long
as the server's held-out ones, or else of data.sequence_length.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from fedtune.core.adapter.layout import Factors
from fedtune.core.job.settings import Job
from fedtune.core.round_records import ClientRecord, Evaluation, RoundRecord, Work, WorkPurpose
from fedtune.model.flops import ExampleLengths, Flops
from fedtune.server.costs.power import Meter


@dataclass(frozen=True)
class _Counted:
    """Operations and tokens."""

    flops: float = 0.0
    tokens: int = 0

    def __add__(self, other: _Counted) -> _Counted:
        return _Counted(self.flops + other.flops, self.tokens + other.tokens)


class WorkCounter:
    """Counts the work of a run's rounds, from now on.

    Args:
        lengths: the mean length of the server's held-out examples; None where there are none.
        meter: reads the machine's power.
        now: seconds on a clock that only goes forward.
    """

    def __init__(
        self,
        job: Job,
        flops: Flops,
        lengths: ExampleLengths | None,
        meter: Meter,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        longest = float(job.data.sequence_length)
        self._job, self._flops, self._meter, self._now = job, flops, meter, now
        self._lengths = lengths or ExampleLengths(longest, longest)
        self._scores: list[Evaluation] = []
        self._since = now()

    def scored(self, evaluation: Evaluation) -> None:
        """Adds an evaluation outside of a round to the work of the next one."""
        self._scores.append(evaluation)

    def counted(self, record: RoundRecord) -> RoundRecord:
        """Returns the record with the work since the last call."""
        now = self._now()
        elapsed, self._since = now - self._since, now
        scores = [*self._scores, *([record.eval] if record.eval else [])]
        own = [self._scored(score, self._job.evaluation.answer_tokens) for score in scores]
        clients = [self._scored(part.evaluation, 0) for part in record.client_evaluations if part.evaluation]
        self._scores = []
        scored = sum((*own, *clients), _Counted())
        seconds = _by_purpose(record, elapsed, bool(scored.tokens))
        work = [
            *_among_tiers(self._trained(record), seconds["training"]),
            Work("aggregation", seconds=seconds["aggregation"]),
            Work("evaluation", None, scored.flops, scored.tokens, seconds["evaluation"]),
        ]
        watts = self._meter.watts()
        if watts is None:
            return replace(record, work=tuple(work))
        metered = tuple(replace(part, joules=watts * part.seconds) for part in work)
        return replace(record, work=metered, energy=self._meter.source)

    def _scored(self, score: Evaluation, answer_tokens: int) -> _Counted:
        """Returns the cost of an evaluation; generated answers are counted at their full length."""
        lengths = replace(self._lengths, targets=score.tokens / max(score.examples, 1))
        one = _Counted(self._flops.scored(lengths), round(lengths.tokens))
        if answer_tokens and score.answered:
            prompt = max(self._lengths.tokens - self._lengths.targets, 0.0)
            answered = ExampleLengths(prompt + answer_tokens, answer_tokens)
            one += _Counted(self._flops.scored(answered), round(answered.tokens))
        return _Counted(score.examples * one.flops, score.examples * one.tokens)

    def _trained(self, record: RoundRecord) -> dict[int, _Counted]:
        """Returns the cost of training by tier, of all clients whose update has arrived."""
        tiers: dict[int, _Counted] = defaultdict(_Counted)
        recomputed = self._job.training.gradient_checkpointing
        for client in record.clients:
            if "update" not in client.traffic.up:
                continue
            tokens, lengths = self._tokens(client)
            example = self._flops.trained(lengths, cast(Factors, record.factors), recomputed)
            tiers[client.tier] += _Counted(tokens / lengths.tokens * example, round(tokens))
        return tiers

    def _tokens(self, client: ClientRecord) -> tuple[float, ExampleLengths]:
        """Returns the tokens that a client computed, and the lengths of its examples."""
        training, lengths = self._job.training, self._lengths
        step = float(training.batch_tokens)
        if not client.examples:  # under secure aggregation
            return training.steps * step, lengths
        lengths = replace(lengths, targets=min(client.tokens / client.examples, lengths.tokens))
        everything = client.examples * lengths.tokens
        if training.local_epochs:
            return training.local_epochs * everything, lengths
        return training.steps * min(step, everything), lengths


def _by_purpose(record: RoundRecord, elapsed: float, scored: bool) -> dict[WorkPurpose, float]:
    """Returns the seconds of each purpose; they sum to `elapsed`."""
    inside = min(record.seconds, elapsed)
    answers = [client.answered for client in record.clients if client.answered is not None]
    training = min(max(answers, default=inside), inside)
    between = elapsed - inside
    return {
        "training": training,
        "aggregation": inside - training + (0.0 if scored else between),
        "evaluation": between if scored else 0.0,
    }


def _among_tiers(tiers: dict[int, _Counted], seconds: float) -> Sequence[Work]:
    """Shares training's seconds out to tiers, by operations."""
    total = sum(part.flops for part in tiers.values())
    if not total:
        return [Work("training", seconds=seconds)]
    return [
        Work("training", tier, part.flops, part.tokens, seconds * part.flops / total)
        for tier, part in sorted(tiers.items())
    ]
