"""The held-out examples of an export: those of the check, others for calibration, and what must be said about them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from fedtune.core.errors import DataError
from fedtune.data.examples import Example, load_examples, prepare
from fedtune.data.population import evaluation_records
from fedtune.server.export.merge import FinishedRun
from fedtune.server.export.request import ExportOptions, no_held_out_examples
from fedtune.server.run_directory import read_summary

CHECKED = 20  # fewer examples say too little about others
CALIBRATION, MOST_TOKENS = 512, 32_768  # examples and tokens for calibrated recipes, at most
CALIBRATION_TOKENS = 256  # fewer say too little about the products' inputs
FEW = 32  # fewer examples beyond the gate's are too few to calibrate with
UNLIKE, UNLIKE_MARGIN = 2.0, 0.5  # times and more loss than at the run's end: examples of another task


def split_examples(run: FinishedRun, options: ExportOptions) -> tuple[list[Example], tuple[tuple[int, ...], ...]]:
    """Returns the gate's examples, and the token ids of others for calibration, which must not be the same.

    The job's examples beyond the gate's calibrate; where they are few, the last quarter of all does, or with
    `options.data` the job's own.

    Raises:
        InputError: see `held_out_examples`.
    """
    examples = held_out_examples(run, options.data)
    checked, spare = examples[: options.prompts], examples[options.prompts :]
    if len(spare) < FEW and options.data is not None and evaluation_records(run.job.data):
        known = {tuple(example.ids) for example in checked}
        own = held_out_examples(run, None)
        spare += [example for example in own if tuple(example.ids) not in known]
    if len(spare) < FEW and len(examples) > 1:
        kept = max(1, len(examples) - max(1, min(2 * FEW, len(examples) // 4)))
        checked, spare = examples[: min(kept, options.prompts)], examples[kept:]
    ids = [tuple(int(token) for token in example.ids) for example in spare[:CALIBRATION]]
    ends = accumulate(map(len, ids))
    return checked, tuple(each for each, end in zip(ids, ends, strict=True) if end - len(each) < MOST_TOKENS)


def too_few_to_check(checked: Sequence[Example]) -> tuple[str, ...]:
    """Returns a remark where the check says little about other examples, else none."""
    if len(checked) >= CHECKED:
        return ()
    remark = (
        f"The check is on few held-out examples: {len(checked)}, expected {CHECKED} or more. So the model may be worse "
        "on others than it shows; give more with --data FILE or a larger --prompts"
    )
    return (remark,)


def too_few_to_calibrate(calibration: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Returns a remark where int4 has to be quantized without calibration, else none."""
    found = sum(map(len, calibration))
    if found >= CALIBRATION_TOKENS:
        return ()
    remark = (
        f"The calibration set is too small: {found} tokens, expected {CALIBRATION_TOKENS} or more beside the examples "
        "of the check. So int4 is quantized without it; more held-out examples (--data FILE) make it better"
    )
    return (remark,)


def unlike_the_run(run: FinishedRun, loss: float) -> tuple[str, ...]:
    """Returns a remark where the examples look like another task's than the run's: far worse than its evaluation.

    Args:
        loss: the merged model's mean loss of a completion token of the examples.
    """
    after = read_summary(run.path).get("eval_after")
    if not after or loss <= UNLIKE * after["loss"] + UNLIKE_MARGIN:
        return ()
    remark = (
        f"The held-out examples look unlike the run's own: the merged model's loss on them is {loss:.2f}, and was "
        f"{after['loss']:.2f} at the end of the run; give examples of the run's task: --data FILE"
    )
    return (remark,)


def held_out_examples(run: FinishedRun, data: Path | None) -> list[Example]:
    """Reads the examples for the gate: the job's evaluation data, or the given file.

    Raises:
        InputError: there are none; an export is never published unchecked.
    """
    tokenizer, length = run.base.tokenizer, run.job.data.sequence_length
    if data is not None:
        return load_examples(data, tokenizer, length)[0]
    records = evaluation_records(run.job.data)
    if not records:
        raise no_held_out_examples(run.path)
    examples, report = prepare(records, tokenizer, length)
    if not examples:
        raise DataError(Path(run.job.data.evaluation), f"no usable example ({report})")
    return examples
