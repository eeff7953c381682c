"""How much of the clients' training has reached the server, by the way in which coordinates are chosen?

The demo's ten households train for ROUNDS rounds, uncompressed. Their updates are then sent again, a share of the
coordinates each round, the same ones from every client, and the others stay in the residuals. The error after a round
is the squared norm of the residual over that of all training so far. The selection is linear and the same for all
clients, so the mean of ten residuals is the residual of the mean, and one vector is enough.

    turns           as the codec does: fedtune.core.codec.coordinate_selection
    random          drawn again each round
    last aggregate  four fifths where the last aggregate was largest, the others drawn again each round
    oracle          where the mean residual is largest, which nobody knows; no public choice can be much better
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path

import numpy as np
import torch
from tables import publish

from fedtune.client.torch.training import train_locally
from fedtune.client.trainer import LocalTask
from fedtune.core.adapter.layout import FACTORS
from fedtune.core.codec import select_largest, select_public
from fedtune.core.job.job_file import load_job
from fedtune.core.job.local_work import local_work
from fedtune.core.seeds import derive_seed
from fedtune.data.examples import prepare
from fedtune.data.population import Population
from fedtune.model.base_model import load_base
from fedtune.model.lora import adapt
from fedtune.strategies.federation import scheduled_learning_rate

JOB = Path(__file__).parent.parent / "demo" / "job.toml"
QUESTION = "How much of the clients' training has reached the server, by the way in which coordinates are chosen?"
ROUNDS = 8
DENSITIES = (0.25, 0.4)
FOLLOWING = 0.8
SEED = 0

Choice = Callable[[int, float, np.ndarray, np.ndarray], np.ndarray]


def trained_updates() -> tuple[list[np.ndarray], list[slice]]:
    """Returns the mean update of every round, and the slices of the factors in it."""
    job = load_job(JOB)
    torch.set_num_threads(max(1, job.simulation.threads))
    model = adapt(load_base(job.model, weights=job.training.weights, precision=job.training.precision), job.adapter)
    population = Population(job.data, SEED)
    households = {
        name: prepare(population.records(name), model.base.tokenizer, job.data.sequence_length)[0]
        for name in population.names
    }
    adapter, updates = model.layout.initial(SEED), []
    for number in range(1, ROUNDS + 1):
        total = np.zeros_like(adapter)
        for name, examples in households.items():
            work = local_work(job.training, learning_rate=scheduled_learning_rate(job, number))
            task = LocalTask(derive_seed(SEED, "train", number, name), work)
            total += train_locally(model, examples, adapter, task).update
        updates.append(total / np.float32(len(households)))
        adapter = adapter + updates[-1]
        print(f"round {number}/{ROUNDS}", flush=True)
    return updates, [model.layout.segment(factor) for factor in FACTORS]


def selection_phases(round_number: int, density: float, waiting: np.ndarray, last: np.ndarray) -> np.ndarray:
    del last
    return select_public(waiting.size, density, SEED, round_number)


def drawn(round_number: int, density: float, waiting: np.ndarray, last: np.ndarray) -> np.ndarray:
    del last
    return _random(waiting.size, density, round_number)


def following(round_number: int, density: float, waiting: np.ndarray, last: np.ndarray) -> np.ndarray:
    if not last.any():
        return _random(waiting.size, density, round_number)
    chosen = select_largest(last, FOLLOWING * density)
    others = np.flatnonzero(~chosen)
    share = (density - FOLLOWING * density) * waiting.size / others.size
    chosen[others[_random(others.size, share, round_number)]] = True
    return chosen


def oracle(round_number: int, density: float, waiting: np.ndarray, last: np.ndarray) -> np.ndarray:
    del round_number, last
    return select_largest(waiting, density)


CHOICES: dict[str, Choice] = {
    "selection_phases": selection_phases,
    "random": drawn,
    "last aggregate": following,
    "oracle": oracle,
}


def errors(updates: list[np.ndarray], density: float, choose: Choice) -> list[float]:
    """Returns ‖residual‖² / ‖sum of updates so far‖² of one factor after each round."""
    waiting, trained, last = (np.zeros_like(updates[0]) for _ in range(3))
    left = []
    for number, update in enumerate(updates):
        trained += update
        waiting += update
        last = np.where(choose(number, density, waiting, last), waiting, 0)
        waiting = waiting - last
        left.append(float(np.square(waiting).sum() / np.square(trained).sum()))
    return left


def _random(count: int, density: float, round_number: int) -> np.ndarray:
    return np.random.default_rng(round_number).permutation(count) < round(density * count)


def main() -> None:
    updates, segments = trained_updates()
    rows = []
    for density in DENSITIES:
        for name, choose in CHOICES.items():
            parts = [errors([update[segment] for update in updates], density, choose) for segment in segments]
            shown = (ceil(1 / density), ROUNDS)
            rows.append([f"{density:g}", name, *(f"{part[after - 1]:.0%}" for part in parts for after in shown)])
    publish(
        __file__,
        QUESTION,
        [
            "density",
            "coordinates",
            *(f"{factor.upper()}, after {when}" for factor in FACTORS for when in ("one turn", f"{ROUNDS} rounds")),
        ],
        rows,
    )


if __name__ == "__main__":
    main()
