"""One run of benchmarks/real: a federation from its beginning, or from its last whole round, and its final score.

The run directory has the bytes, round by round. The final adapter is scored here, since the table compares rows example
by example, and the product keeps totals only.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from book import Run
from rows import Place

from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.core.round_records import RoundRecord
from fedtune.data.batches import collate
from fedtune.data.examples import Example, prepare
from fedtune.data.records import read_records
from fedtune.model.adapted_model import AdaptedModel
from fedtune.model.loss import on_device, score
from fedtune.server.preflight import check_simulation
from fedtune.server.run_directory import JOB, RunDirectory, is_finished, read_rounds
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulated_run import open_context, run_job

TEST = "eval.jsonl"
SCORED_TOGETHER = 64


class TimeIsUpError(Exception):
    """The budget is over; the run goes on after its last whole round at the next call."""


class Progress(Silent):
    """A display with one growing line a run, which ends the run after a round when its time is over.

    Args:
        deadline: value of `time.monotonic` after which no further round begins; None for no end.
    """

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline
        self._rounds, self._started = 0, time.monotonic()

    def begin(self, done: int, rounds: int, cohort: int, moved: int) -> None:
        del done, cohort, moved
        self._rounds, self._started = rounds, time.monotonic()

    def round(self, record: RoundRecord) -> None:
        last = record.round == self._rounds
        seconds = time.monotonic() - self._started
        score = f", exact match {record.eval.exact_match:.1%}" if record.eval else ""
        text = f"  round {record.round}/{self._rounds}, {seconds:.0f} s{score}"
        print(f"{text:60}", end="\n" if last else "\r", flush=True)
        if not last and self._deadline is not None and time.monotonic() > self._deadline:
            raise TimeIsUpError


def measure(run: Run, place: Place, path: Path, deadline: float | None) -> dict[str, Any]:
    """Trains and scores one run.

    Args:
        path: its run directory; the rounds that are there already are kept if they are of the same job.

    Raises:
        InputError: this version of fedtune does not permit the row.
        TimeIsUpError: the deadline came first.
    """
    job = place.job(*run)
    if path.exists() and not _same(path, job):
        shutil.rmtree(path)
    context = open_context(check_simulation(job), path, display := Progress(deadline))
    begun = path.exists()
    directory = RunDirectory.open(path) if begun else RunDirectory.create(path, job, context.base.digest)
    with closing(directory):
        summary = run_job(context, directory, display, run.row.parts(run.draw))
        checkpoint = directory.restore()
    assert checkpoint is not None, "a run that has ended has a checkpoint"
    context.model.load(checkpoint.state.adapter)
    right, loss = score_each(context.model, test_examples(place, context.model, job))
    rounds = read_rounds(path)
    return {
        "right": np.packbits(right).tobytes().hex(),
        "examples": len(right),
        "exact_match": float(right.mean()),
        "loss": loss,
        "curve": _curve(summary, rounds),
        "bytes": _sums(rounds),
        "client_rounds": sum(len(line["cohort"]) for line in rounds),
        "trained": summary["adapter_parameters"],
        "precision": context.model.base.precision,
        "seconds": summary["seconds"],
        "commit": commit(),
    }


def test_examples(place: Place, model: AdaptedModel, job: Job) -> list[Example]:
    """Returns the records that the table is about, tokenised; the same ones in the same order for every row."""
    records, _ = read_records(place.task / TEST)
    return prepare(records, model.base.tokenizer, job.data.sequence_length)[0]


@torch.no_grad()
def score_each(model: AdaptedModel, examples: Sequence[Example]) -> tuple[np.ndarray, float]:
    """Scores the adapter that the model holds.

    Returns:
        Whether each example is answered exactly as in `fedtune.model.scoring`, bool, (examples,); and the mean
        cross-entropy of the target tokens.
    """
    model.base.network.eval()
    right = np.zeros(len(examples), dtype=bool)
    total, tokens = 0.0, 0
    order = np.argsort([len(example.ids) for example in examples], kind="stable")
    for chosen in np.split(order, range(SCORED_TOGETHER, len(order), SCORED_TOGETHER)):
        batch = on_device(collate([examples[place] for place in chosen]), model.base.device)
        losses, likeliest = score(model.lm_head, batch)
        wrong = torch.zeros(len(chosen)).index_add_(0, batch.owners.cpu(), (~likeliest).float().cpu())
        right[chosen] = (wrong == 0).numpy()
        total, tokens = total + float(losses.double().sum()), tokens + len(losses)
    return right, total / tokens


def commit() -> str:
    """Returns the commit of the code that ran, "" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _same(path: Path, job: Job) -> bool:
    """Returns whether the run directory is of this job; a finished one was not scored, since its line is missing."""
    file = path / JOB
    return file.is_file() and load_job(file) == job and (is_finished(path) or not (path / "summary.json").exists())


def _curve(summary: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns round, bytes so far, exact match and loss for each evaluation on the validation records."""
    points, moved = [{"round": 0, "bytes": 0, **_quality(summary["eval_before"])}], 0
    for line in rounds:
        moved += line["bytes"]["up"] + line["bytes"]["down"]
        if line["eval"]:
            points.append({"round": line["round"], "bytes": moved, **_quality(line["eval"])})
    return points


def _quality(evaluation: dict[str, Any]) -> dict[str, float]:
    return {"exact_match": evaluation["exact_match"], "loss": evaluation["loss"]}


def _sums(rounds: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Returns all bytes of a run by direction, and those of them that are the protocol of secure aggregation."""
    return {name: sum(line["bytes"][name] for line in rounds) for name in ("up", "down", "secagg")}
