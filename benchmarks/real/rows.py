"""The rows of benchmarks/real: what is trained and sent, at which participation, on which base; and each run's job.

Every row is the scene's job file with some keys changed. A round has ten clients everywhere, and the population's size
makes the participation, so that all rows of a scene take the same number of client-rounds, and nearly the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.core.round_records import ClientRecord
from fedtune.core.seeds import generator
from fedtune.strategies.assembly import NO_PARTS, Parts

HERE = Path(__file__).parent
COHORT = 10
RATES = tuple(2.5e-4 * 2.0**power for power in range(10))  # the one grid of all rows: 0.00025 to 0.128
ONCE = "once"

IN_THE_CLEAR = ("secure_aggregation.enabled=false",)
FLOAT32 = (*IN_THE_CLEAR, "compression.preset=none")
LORA = ("adapter.kind=lora", "adapter.rank=16", "training.optimizer=adamw")
CORE = ("adapter.kind=core", "adapter.rank=40", "training.optimizer=muon")
# The product's default, key by key, so that another default changes no recorded line.
DEFAULT = (*CORE, "compression.bits=3", "compression.downlink_bits=4")
# The first edition's default in the clear. Its secure one is refused: under masks no residual is kept any more.
FIRST_CLEAR = (
    *("compression.form=sparse", "compression.density=0.07", "compression.bits=3", "compression.error_feedback=true"),
    "compression.downlink_bits=2",
)


@dataclass(frozen=True)
class Method:
    """A way to train and to send.

    Args:
        title: its name in the table.
        keys: overrides of the scene's job.
    """

    title: str
    keys: tuple[str, ...]


METHODS = {
    "float32": Method("A and B, rank 16, float32 (FedAvg)", (*FLOAT32, *LORA)),
    "secure": Method("the default, secure: core of rank 40", ("compression.form=ring", *DEFAULT)),
    "clear": Method("the default, in the clear", (*IN_THE_CLEAR, "compression.form=dense", *DEFAULT)),
    "core": Method("core of rank 40, float32", (*FLOAT32, *CORE)),
    "float32-muon": Method("A and B, rank 16, float32, by Muon", (*FLOAT32, *LORA[:2], "training.optimizer=muon")),
    "lora-secure": Method(
        "A and B, rank 16, secure",
        ("compression.form=ring", *LORA, "compression.bits=3", "compression.downlink_bits=4"),
    ),
    "first-clear": Method("first edition's default, in the clear", (*IN_THE_CLEAR, *LORA, *FIRST_CLEAR)),
    "ffa": Method("B alone, rank 16, float32 (FFA-LoRA)", (*FLOAT32, *LORA, "federation.aggregation=ffa")),
    "centralised": Method("centralised LoRA, rank 16", (*FLOAT32, *LORA)),
    "alone": Method("each client alone, LoRA of rank 16 (mean of 8)", (*FLOAT32, *LORA)),
}
REFERENCE = "float32"


@dataclass(frozen=True)
class Scene:
    """A base model and a task.

    Args:
        job: job file that all rows change.
        seeds: seeds of the training; the first one chooses the learning rate.
        lora_rates, core_rates: the places in RATES at which the search begins, by kind of adapter.
    """

    name: str
    job: Path
    seeds: tuple[int, ...]
    lora_rates: tuple[int, int]
    core_rates: tuple[int, int] = (6, 7)


SCENES = {
    "small": Scene("small", HERE / "small.toml", (0, 1, 2), (3, 4)),
    "smollm2": Scene("smollm2", HERE / "smollm2.toml", (0,), (1, 2)),
}
POPULATIONS = {"1.0": COHORT, "0.5": 2 * COHORT, "0.1": 10 * COHORT}
LONERS = 8


@dataclass(frozen=True)
class Draw:
    """One of the trainings whose mean is a row: a seed, and for a row of single clients the client's number."""

    seed: int
    client: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    scene: Scene
    method: str
    participation: str

    @property
    def name(self) -> str:
        return f"{self.scene.name}/{self.method}/{self.participation}"

    @property
    def first_rates(self) -> tuple[int, int]:
        """The places in RATES at which the search for the learning rate begins."""
        return self.scene.core_rates if CORE[0] in METHODS[self.method].keys else self.scene.lora_rates

    @property
    def draws(self) -> tuple[Draw, ...]:
        """The trainings of the row."""
        if self.method == "alone":
            return tuple(Draw(self.scene.seeds[0], client) for client in range(LONERS))
        return tuple(Draw(seed) for seed in self.scene.seeds)

    @property
    def tuning(self) -> tuple[Draw, ...]:
        """The trainings by which the learning rate is chosen."""
        return self.draws[: 2 if self.method == "alone" else 1]

    def overrides(self, draw: Draw, rate: float) -> list[str]:
        """Returns all keys in which the run's job differs from the scene's file, paths excepted."""
        keys = [*METHODS[self.method].keys, f"training.seed={draw.seed}", f"training.learning_rate={rate:g}"]
        steps, population = load_job(self.scene.job).training.steps, self._population()
        if self.method == "centralised":
            single = ["data.partition=iid", "federation.clients_per_round=1"]
            return [*keys, *single, "data.clients=1", f"training.local_steps={COHORT * steps}"]
        keys.append(f"data.clients={population}")
        if self.method == "alone":
            share = max(1, round(COHORT * steps / population))
            return [*keys, "federation.clients_per_round=1", f"training.local_steps={share}"]
        return [*keys, f"federation.clients_per_round={COHORT}"]

    def parts(self, draw: Draw) -> Parts:
        """Returns the selection of clients where it is not the job's."""
        if draw.client is not None:
            return Parts(selection=Turns(1, draw.seed, only=draw.client))
        if self.participation == ONCE:
            return Parts(selection=Turns(COHORT, draw.seed))
        return NO_PARTS

    def _population(self) -> int:
        if self.participation == ONCE:
            return COHORT * load_job(self.scene.job).federation.rounds
        return POPULATIONS[self.participation]


@dataclass(frozen=True)
class Turns:
    """A selection in which every client takes part once, in a random order; or always the same client.

    Args:
        wanted: number of clients in a round.
        only: place of the one client among all names.
    """

    wanted: int
    seed: int
    only: int | None = None

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        """Returns the round's names in sorted order."""
        names = sorted(population)
        if self.only is not None:
            return [names[self.only]]
        order = generator(self.seed, "turns").permutation(len(names))
        return sorted(names[place] for place in np.roll(order, -(round_number - 1) * self.wanted)[: self.wanted])

    def deadline(self, population: Sequence[str]) -> None:
        """Returns None: the round waits for all clients."""
        del population

    def learned(self, round_number: int, clients: Sequence[ClientRecord]) -> Turns:
        """Returns the same selection."""
        del round_number, clients
        return self


def planned() -> list[Row]:
    """Returns all rows, those that matter most first."""
    small, smollm2 = SCENES["small"], SCENES["smollm2"]
    ours = [name for name in METHODS if name in ("secure", "clear")]
    others = [name for name in METHODS if name not in (REFERENCE, *ours, "centralised", "alone")]
    compared = [Row(small, method, part) for method in (REFERENCE, *ours) for part in ("0.5", "0.1")]
    more = [Row(small, method, part) for method in others for part in ("0.5", "0.1")]
    edges = [Row(small, method, part) for method in (REFERENCE, *ours) for part in (ONCE, "1.0")]
    real = [Row(smollm2, method, "0.5") for method in (REFERENCE, *ours)]
    bounds = [Row(small, method, "0.5") for method in ("centralised", "alone")]
    return [*compared, *real, *more, *edges, *bounds]


@dataclass(frozen=True)
class Place:
    """The files of a scene on this machine: the base model, and the folder with the task's files."""

    base: Path
    task: Path

    def job(self, row: Row, draw: Draw, rate: float) -> Job:
        """Returns the job of one run.

        Raises:
            InputError: this version of fedtune does not permit the row.
        """
        paths = {
            "model.base": self.base,
            "data.train": self.task / "train.jsonl",
            "data.evaluation": self.task / "validation.jsonl",
        }
        keys = [f'{key}="{path.absolute()}"' for key, path in paths.items()]
        return load_job(row.scene.job, [*row.overrides(draw, rate), *keys])
