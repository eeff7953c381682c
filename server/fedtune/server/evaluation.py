"""The server's evaluation: a job's held-out examples, cut into pieces that any number of workers compute.

    held_out = HeldOut(model, job)
    evaluator = HeldOutEvaluator(held_out, in_this_process(model))       # in a simulation, executor.spread
    evaluator.evaluate(adapter, progress)

The pieces follow from the examples alone and their results are put in order again, so that the number of workers
changes no bit of an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import DataError, InputError, RunError
from fedtune.core.job.settings import Job
from fedtune.core.metrics import METRICS
from fedtune.core.round_records import Evaluation
from fedtune.core.spans import span
from fedtune.data.batches import LENGTH_STEP
from fedtune.data.examples import Example, prepare, render
from fedtune.data.population import evaluation_records
from fedtune.model.adapted_model import AdaptedModel
from fedtune.model.flops import ExampleLengths
from fedtune.model.scoring import (
    AnsweredPrompts,
    Piece,
    ScoredBatch,
    answered_prompts,
    evaluation_tokens,
    prompt_ids,
    scored_batches,
    total,
)
from fedtune.server.answer_metrics import mean_score, require_metrics
from fedtune.server.custom_metrics import NO_METRICS, CustomMetrics
from fedtune.server.run_rounds import SHOWN_PROMPTS, Progress, ShownPrompt

Spread = Callable[[Vector, Sequence[Piece[Any]]], Iterator[tuple[int, Any]]]
"""(adapter, pieces) -> (index of a piece, its result) for each piece, in the order in which they are done."""


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
        job: the job, whose data settings name the examples.
        custom: metrics beside the job's.

    Raises:
        DataError: the examples cannot be read, none is usable, or none has a prompt that a metric could have answered.
        InputError: there are custom metrics but no examples, or one fails on the first example's expected answer.
        MissingExtraError: the package that computes the job's metric is missing.
    """

    def __init__(self, model: AdaptedModel, job: Job, custom: CustomMetrics = NO_METRICS) -> None:
        self._tokenizer = model.base.tokenizer
        self._records, path = evaluation_records(job.data), Path(job.data.evaluation)
        self.metric, self.custom = job.evaluation.metric, custom
        self.examples: Sequence[Example] = ()
        self.batches: Sequence[ScoredBatch] = ()
        self.groups: Sequence[AnsweredPrompts] = ()
        self.prompts: Sequence[str] = ()
        self.references: Sequence[str] = ()
        if not self._records:
            if custom:
                raise InputError(
                    "custom metrics compare answers to the server's held-out examples, but there are none; expected "
                    "evaluation rows, or a file as data.evaluation"
                )
            return
        self.examples, report = prepare(self._records, self._tokenizer, job.data.sequence_length)
        if not self.examples:
            raise DataError(path, f"no usable example ({report})")
        self.batches = scored_batches(self.examples, evaluation_tokens(model.base.device))
        if METRICS[self.metric].generated:
            require_metrics(self.metric)
        if METRICS[self.metric].generated or custom:
            self._ask(path, job.evaluation.answer_tokens)

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

    @property
    def lengths(self) -> ExampleLengths | None:
        """The mean length of the examples, as they are computed; None without examples."""
        count = len(self.examples)
        if not count:
            return None
        padded = sum(-(-len(one.ids) // LENGTH_STEP) * LENGTH_STEP for one in self.examples)
        return ExampleLengths(padded / count, sum(one.target_tokens for one in self.examples) / count)

    @property
    def example_tokens(self) -> float | None:
        """The mean number of tokens of an example; None without examples."""
        return sum(len(one.ids) for one in self.examples) / len(self.examples) if self.examples else None

    @property
    def samples(self) -> list[AnsweredPrompts]:
        """The pieces that answer the shown prompts, one each: there are few, and every worker takes one."""
        return answered_prompts(prompt_ids([shown.input for shown in self.shown], self._tokenizer), together=1)

    def _ask(self, path: Path, answer_tokens: int) -> None:
        """Prepares the pieces that generate an answer to every example with a prompt, and tries custom metrics once."""
        asked = sorted((one for one in self.examples if one.first_target > 1), key=lambda one: one.first_target)
        if not asked:
            metric = "there are custom metrics" if self.custom else f'evaluation.metric is "{self.metric}"'
            problem = f"no example has a prompt, but {metric}, which compares answers"
            raise DataError(path, f'{problem}; expected {{"prompt", "completion"}} or {{"messages"}}')
        prompts = [one.ids[: one.first_target].tolist() for one in asked]
        self.groups = answered_prompts(prompts, answer_tokens)
        self.prompts = self._tokenizer.batch_decode(prompts, skip_special_tokens=True)
        completions = [one.ids[one.first_target :].tolist() for one in asked]
        self.references = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        self.custom.try_once(self.prompts[0], self.references[0])


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

    @property
    def lengths(self) -> ExampleLengths | None:
        """The mean length of the held-out examples."""
        return self._held_out.lengths

    def evaluate(self, adapter: Vector, progress: Progress) -> Evaluation | None:
        """Scores an adapter; returns None if the job has no evaluation data.

        Raises:
            RunError: the loss is not finite, or a custom metric fails or is not finite on an example.
        """
        held_out = self._held_out
        if not held_out.batches:
            return None
        with span("evaluation"):
            results = self._computed(adapter, [*held_out.groups, *held_out.batches], progress)
        groups = len(held_out.groups)
        answers: list[str] = [answer for group in results[:groups] for answer in group]
        judged = METRICS[held_out.metric].generated
        score = mean_score(held_out.metric, answers, held_out.references) if judged else None
        scored = total(results[groups:])
        if not math.isfinite(scored.loss):
            raise RunError(
                "the held-out examples have no finite loss: the base model or its adapter gives logits that are no "
                "numbers; expected a smaller training.learning_rate, or another base model"
            )
        custom = held_out.custom.means(held_out.prompts, held_out.references, answers)
        return replace(scored, metric=held_out.metric, score=score, custom=custom)

    def answer(self, adapter: Vector, progress: Progress) -> list[str]:
        """Returns the adapter's answers to the shown prompts."""
        with span("sample answers"):
            results = self._computed(adapter, self._held_out.samples, progress)
        return [answer for group in results for answer in group]

    def _computed(self, adapter: Vector, pieces: Sequence[Piece[Any]], progress: Progress) -> list[Any]:
        """Returns the result of every piece, in the order of the pieces."""
        results: dict[int, Any] = {}
        progress(0, len(pieces))
        for index, result in self._spread(adapter, pieces):
            results[index] = result
            progress(len(results), len(pieces))
        return [results[index] for index in range(len(pieces))]
