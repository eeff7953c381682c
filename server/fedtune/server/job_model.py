"""The job's base model on the server: its description for requests, and the evaluator that scores adapters on it."""

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
from fedtune.model.adapted_model import AdaptedModel, adapt
from fedtune.model.base_model import load_base
from fedtune.model.scoring import answer, evaluate
from fedtune.server.run_rounds import SHOWN_PROMPTS, ShownPrompt


def open_model(job: Job) -> AdaptedModel:
    """Loads the job's base model and adds the job's adapter.

    Raises:
        ModelError: the model does not exist, or the adapter does not fit it.
    """
    base = load_base(job.model, weights=job.training.weights, precision=job.training.precision)
    return adapt(base, job.adapter)


def describe_base(job: Job, model: AdaptedModel) -> Base:
    """Returns the description of a job's base model and adapter that requests contain."""
    targets = job.adapter.target_modules
    return Base(
        name=job.model.base,
        digest=model.base.digest,
        quantization=job.model.quantization,
        rank=job.adapter.rank,
        alpha=job.adapter.alpha,
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
        sequence_length=job.data.sequence_length,
        kind=job.adapter.kind,
        fixed=model.layout.fixed_digest,
    )


class ModelEvaluator:
    """The evaluator that scores adapters on a job's `data.evaluation`.

    Args:
        model: the model, whose adapter is swapped; nothing else may use it meanwhile.
        data: the job's data settings, which name the examples.
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
        """Returns a few prompts spread over the file, as the model sees them; plain text has none."""
        prompted = [record for record in self._records if record.prompt or record.messages]
        step = max(1, len(prompted) // SHOWN_PROMPTS)
        chosen = prompted[::step][:SHOWN_PROMPTS]
        prompts, _ = render(chosen, self._model.base.tokenizer)
        return [ShownPrompt(prompt, each.completion) for prompt, each in zip(prompts, chosen, strict=True)]

    def evaluate(self, adapter: Vector) -> Evaluation | None:
        """Scores an adapter; returns None if the job has no evaluation data."""
        if not self._examples:
            return None
        self._model.load(adapter)
        return evaluate(self._model, self._examples)

    def answer(self, adapter: Vector) -> list[str]:
        """Returns the adapter's answers to the shown prompts."""
        if not self.shown:
            return []
        self._model.load(adapter)
        return answer(self._model, [shown.prompt for shown in self.shown])
