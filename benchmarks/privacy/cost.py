"""The cost of noise and rounding for a client, in time and bits; written into RESULTS.md by run.py.

    python benchmarks/privacy/cost.py
    python benchmarks/privacy/cost.py --base BASE --task TASK

A client's round is its local training, measured here on the job's first client, and the encoding of its update. Both
codecs encode the same update in the same run; processor time of one thread, the best of REPEATS.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from privacy_jobs import COHORT, job_paths

from fedtune.client.torch.torch_trainer import TorchTrainer
from fedtune.client.trainer import LocalTask
from fedtune.core.adapter.layout import Vector
from fedtune.core.codec import MaskableCodec, RoundContext
from fedtune.core.codec.noised import NoisedCodec
from fedtune.core.codec.uplink import Compression
from fedtune.core.job.job_file import load_job
from fedtune.core.job.learning_rates import with_learning_rate
from fedtune.core.job.local_work import local_work
from fedtune.core.job.settings import Job
from fedtune.core.manifest.round_terms import clip_within
from fedtune.core.privacy.budget import certainly_noised, rho_of_round
from fedtune.data.examples import prepare
from fedtune.server.job_model import open_model
from fedtune.server.preflight import check_simulation

HERE = Path(__file__).parent
REPEATS = 7
EPSILONS = (8.0, 4.0, 2.0, 1.0)
COLUMNS = ("task", "numbers", "ε", "training, s", "encoding without, s", "with noise, s", "more of the round", "bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the small base (benchmarks/real/small_base.py)")
    parser.add_argument("--task", type=Path, help="the folder with train.jsonl and eval.jsonl (examples/real-model)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = [COLUMNS, ("---",) * len(COLUMNS)]
    for task, paths in job_paths(options.base, options.task).items():
        table += rows(task, load_job(HERE / f"{task}.toml", list(paths)))
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    text = [
        "## What do noise and rounding cost a client?",
        "`python benchmarks/privacy/cost.py`",
        "\n".join(lines),
        READING,
    ]
    print("\n\n".join(text))
    (HERE / "cost.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


READING = (
    'Of one client in a round of 100. "More of the round" is what the encoding takes longer, of training and encoding '
    "together; bits are those of a word with noise, and in brackets without."
)


def rows(task: str, job: Job) -> list[tuple[str, ...]]:
    """Measures one job for each ε."""
    model = open_model(job)
    job, trainer = with_learning_rate(job, model.layout), TorchTrainer(model)
    population = check_simulation(job).population
    examples, _ = prepare(population.records(population.names[0]), model.base.tokenizer, job.data.sequence_length)
    received = np.zeros(model.layout.size, np.float32)
    task_of_client = LocalTask(1, local_work(job.training, "r"))
    updates: list[Vector] = []
    training = best(lambda: updates.append(trainer.train(examples, received, task_of_client).update), 3)
    clip = clip_within(job, model.layout, 1, "r", 0.0)
    context = RoundContext(seed=0, count=model.layout.size, clip=clip, n_max=COHORT)
    plain = MaskableCodec(Compression.of(job).bits)
    without = best(lambda: plain.encode(updates[0], 1, context))
    found: list[tuple[str, ...]] = []
    for epsilon in EPSILONS:
        private = dataclasses.replace(job, privacy=dataclasses.replace(job.privacy, epsilon=epsilon))
        codec = NoisedCodec(rho_of_round(private.privacy), sum(certainly_noised(private, (COHORT,))))
        noisy = best(partial(codec.encode, updates[0], 1, context))
        found.append(
            (
                *(task, f"{context.count:,}", f"{epsilon:g}", f"{training:.3f}", f"{without:.4f}", f"{noisy:.4f}"),
                f"{(noisy - without) / (training + without):.1%}",
                f"{codec.width(context)} ({plain.width(context)})",
            )
        )
    return found


def best(step: Callable[[], object], repeats: int = REPEATS) -> float:
    """Returns the least processor time of a step, in seconds."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        taken.append(time.process_time() - start)
    return min(taken)


if __name__ == "__main__":
    main()
