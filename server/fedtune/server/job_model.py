"""The base model that a job names, opened on the server: what requests say about it, and what scores adapters on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from fedtune.core.adapter.layout import Vector
from fedtune.core.errors import DataError
from fedtune.core.job.settings import DataSettings, Job
from fedtune.core.protocol.messages import Base
from fedtune.core.round_records import Evaluation
from fedtune.data.examples import Example, prepare, render
from fedtune.data.population import evaluation_records
from fedtune.model.base_model import load_base
from fedtune.model.lora import AdaptedModel, adapt
from fedtune.model.scoring import answer, evaluate
from fedtune.server.run_rounds import SHOWN_PROMPTS, ShownPrompt


def open_model(job: Job) -> AdaptedModel:
    """The job's base model with the job's adapter on it.

    Raises:
        ModelError: there is no such model, or the adapter does not fit it.
    """
    base = load_base(job.model, weights=job.training.weights, precision=job.training.precision)
    return adapt(base, job.adapter)


def describe_base(job: Job, digest: str) -> Base:
    """What requests say about the base model of that digest."""
    targets = job.adapter.target_modules
    return Base(
        name=job.model.base,
        digest=digest,
        quantization=job.model.quantization,
        rank=job.adapter.rank,
        alpha=job.adapter.alpha,
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
        sequence_length=job.data.sequence_length,
    )


class ModelEvaluator:
    """Scores adapters on a job's `data.evaluation`.

    Args:
        model: its adapter is swapped; nobody else may use it meanwhile.
        data: where the examples come from.
    """

    def __init__(self, model: AdaptedModel, data: DataSettings) -> None:
        self._model = model
        self._records = evaluation_records(data)
        self._examples: Sequence[Example] = ()
        if self._records:
            self._examples, report = prepare(self._records, model.base.tokenizer, data.sequence_length)
            if not self._examples:
                raise DataError(Path(data.evaluation), f"no usable example ({report})")

    @cached_property
    def shown(self) -> Sequence[ShownPrompt]:
        """A few prompts spread over the file, as the model sees them; plain text has none."""
        prompted = [record for record in self._records if record.prompt or record.messages]
        step = max(1, len(prompted) // SHOWN_PROMPTS)
        chosen = prompted[::step][:SHOWN_PROMPTS]
        prompts, _ = render(chosen, self._model.base.tokenizer)
        return [ShownPrompt(prompt, each.completion) for prompt, each in zip(prompts, chosen, strict=True)]

    def evaluate(self, adapter: Vector) -> Evaluation | None:
        """Scores an adapter; None where the job has no evaluation data."""
        if not self._examples:
            return None
        self._model.load(adapter)
        return evaluate(self._model, self._examples)

    def answer(self, adapter: Vector) -> list[str]:
        """What the shown prompts are answered with."""
        if not self.shown:
            return []
        self._model.load(adapter)
        return answer(self._model, [shown.prompt for shown in self.shown])
