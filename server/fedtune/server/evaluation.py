"""The server's evaluation: a job's held-out examples, cut into pieces that any number of workers compute.

    held_out = HeldOut(model, job.data)
    evaluator = HeldOutEvaluator(held_out, in_this_process(model))       # in a simulation, executor.spread
    evaluator.evaluate(adapter, progress)

The pieces follow from the examples alone and their results are put in order again, so that the number of workers
changes no bit of an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import DataError
from fedtune.core.job.settings import DataSettings
from fedtune.core.round_records import Evaluation
from fedtune.data.examples import prepare, render
from fedtune.data.population import evaluation_records
from fedtune.model.adapted_model import AdaptedModel
from fedtune.model.scoring import (
    Piece,
    ScoredBatch,
    answered_prompts,
    evaluation_tokens,
    scored_batches,
    total,
)
from fedtune.server.run_rounds import SHOWN_PROMPTS, Progress, ShownPrompt

Spread = Callable[[Vector, Sequence[Piece[Any]]], Iterator[tuple[int, Any]]]
"""(adapter, pieces) -> (index of a piece, its result) for each piece, in the order in which they are done."""

_Result = TypeVar("_Result")


def in_this_process(model: AdaptedModel) -> Spread:
    """Returns a spread that computes one piece after the other in the calling thread, with torch's threads.

    Args:
        model: the model, whose adapter is swapped; nothing else may use it meanwhile.
    """

    def spread(adapter: Vector, pieces: Sequence[Piece[Any]]) -> Iterator[tuple[int, Any]]:
        model.load(adapter)
        for index, piece in enumerate(pieces):
            yield index, piece.compute(model)

    return spread


class HeldOut:
    """The held-out examples of a job: read, tokenised and cut into pieces.

    Args:
        model: the model that will score them.
        data: the job's data settings, which name the examples.

    Raises:
        DataError: the examples cannot be read, or none is usable.
    """

    def __init__(self, model: AdaptedModel, data: DataSettings) -> None:
        self._tokenizer = model.base.tokenizer
        self._records = evaluation_records(data)
        self.batches: Sequence[ScoredBatch] = ()
        if self._records:
            examples, report = prepare(self._records, self._tokenizer, data.sequence_length)
            if not examples:
                raise DataError(Path(data.evaluation), f"no usable example ({report})")
            self.batches = scored_batches(examples, evaluation_tokens(model.base.device))

    @cached_property
    def shown(self) -> Sequence[ShownPrompt]:
        """A few prompts spread over the file; plain text has none."""
        prompted = [record for record in self._records if record.prompt or record.messages]
        step = max(1, len(prompted) // SHOWN_PROMPTS)
        chosen = prompted[::step][:SHOWN_PROMPTS]
        prompts, _ = render(chosen, self._tokenizer)
        return [
            ShownPrompt(record.asked, prompt, record.completion) for record, prompt in zip(chosen, prompts, strict=True)
        ]


class HeldOutEvaluator:
    """The evaluator of a job's held-out examples.

    Args:
        held_out: the examples.
        spread: computes the pieces of an evaluation.
    """

    def __init__(self, held_out: HeldOut, spread: Spread) -> None:
        self._held_out, self._spread = held_out, spread

    @property
    def shown(self) -> Sequence[ShownPrompt]:
        """The prompts to show."""
        return self._held_out.shown

    def evaluate(self, adapter: Vector, progress: Progress) -> Evaluation | None:
        """Scores an adapter; returns None if the job has no evaluation data."""
        batches = self._held_out.batches
        return total(self._computed(adapter, batches, progress)) if batches else None

    def answer(self, adapter: Vector, progress: Progress) -> list[str]:
        """Returns the adapter's answers to the shown prompts."""
        groups = answered_prompts([shown.input for shown in self.shown])
        return [answer for group in self._computed(adapter, groups, progress) for answer in group]

    def _computed(self, adapter: Vector, pieces: Sequence[Piece[_Result]], progress: Progress) -> list[_Result]:
        """Returns the result of every piece, in the order of the pieces."""
        results: dict[int, _Result] = {}
        progress(0, len(pieces))
        for index, result in self._spread(adapter, pieces):
            results[index] = result
            progress(len(results), len(pieces))
        return [results[index] for index in range(len(pieces))]
