"""How much do few bits cost, and how many travel, where clients take part always, half of the time, rarely or once?

A run is one federation of ten clients a round, read from its summary.json: the server's evaluation at the end, and
every payload byte of training, up and down, as bits for each trained number and client-round. The populations have 10,
20, 100 and 1,000 clients, so a client takes part in every round, in every second, in every tenth, or (nearly always)
once. The peer of a run is the same federation without compression and with the same seed.

    python benchmarks/compression/sweep.py                  # the bundled demo
    python benchmarks/compression/sweep.py JOB.toml         # another base and task; the job says which
    python benchmarks/compression/sweep.py --dry            # prints what is missing, and writes the table again

A finished run is one line of sweep.jsonl, which is kept: a second call continues where the first one stopped. A line
holds the job's keys and the base's digest, so a changed job is run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tables import publish

from fedtune.core.codec.uplink import Compression
from fedtune.core.job.job_file import load_job
from fedtune.model.base_model import load_base
from fedtune.server.run_directory import read_summary
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import simulate

HERE = Path(__file__).parent
DEMO = HERE.parent / "demo" / "job.toml"
RUNS = HERE / "sweep.jsonl"
QUESTION = (
    "How much do few bits cost, and how many travel, where clients take part always, half of the time, rarely or once?"
)
# Masks change no value, and benchmarks/secagg measures what they cost; scores of clients are no part of training.
FIXED = ("secure_aggregation.enabled=false", "federation.clients_per_round=10", "federation.evaluate_every=0")
POPULATIONS = {"always": 10, "half": 20, "a tenth": 100, "once": 1000}
READING = (
    "Bits are those of all payloads of training for each trained number, in one client's round; float32 both ways is "
    "64. Gaps are differences to the run without compression at the same participation and seed, averaged over seeds. "
    "kB are of one client in one round. Updates in a ring are of ten clients; under masks the protocol's own bytes "
    "come on top (benchmarks/secagg)."
)


COLUMNS = (
    *("task", "takes part", "form", "bits", "down", "preset", "seeds"),
    *("exact match", "gap", "loss", "gap of loss", "bits up", "bits down", "kB, both"),
)


@dataclass(frozen=True)
class Setting:
    """A setting of the keys of [compression], so that a changed preset changes no recorded line."""

    form: str
    bits: int
    downlink_bits: int
    density: float | None = None

    def keys(self) -> dict[str, Any]:
        """Returns the keys of [compression]; density exists for the form sparse only."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def presets(self) -> str:
        """Returns the names of the presets with this setting."""
        same = [
            name
            for name in ("balanced", "extreme")
            if meaning({"preset": name, "form": self.form}) == meaning(self.keys())
        ]
        return ", ".join(same)


UNCOMPRESSED = None
SETTINGS: tuple[Setting | None, ...] = (
    UNCOMPRESSED,
    Setting("ring", 2, 4),
    Setting("ring", 3, 4),
    Setting("dense", 2, 4),
    Setting("dense", 3, 4),
    Setting("dense", 2, 3),
    Setting("sparse", 3, 4, density=0.07),
)


def overrides(keys: Mapping[str, Any]) -> list[str]:
    """Returns keys of [compression] as overrides for `load_job`."""
    return [f"compression.{key}={json.dumps(value)}" for key, value in keys.items()]


def meaning(keys: Mapping[str, Any]) -> Compression:
    return Compression.of(load_job(DEMO, [*FIXED, *overrides(keys)]))


@dataclass(frozen=True)
class Run:
    """One planned federation: a setting (None is float32), a participation and a seed."""

    setting: Setting | None
    participation: str
    seed: int

    def overrides(self) -> list[str]:
        keys = {"preset": "none"} if self.setting is None else self.setting.keys()
        population = POPULATIONS[self.participation]
        return [*FIXED, *overrides(keys), f"data.clients={population}", f"training.seed={self.seed}"]


@dataclass(frozen=True)
class Task:
    """A job with a name for the table.

    Args:
        keys: the job file's content without paths, which differ between machines.
    """

    name: str
    path: Path
    keys: Mapping[str, Any]
    base_digest: str

    @classmethod
    def of(cls, path: Path) -> Task:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
        data = {key: value for key, value in keys.get("data", {}).items() if key not in ("train", "evaluation")}
        digest = load_base(load_job(path).model).digest
        name = "demo" if path == DEMO else path.stem
        return cls(name, path, {**{key: keys[key] for key in keys if key != "model"}, "data": data}, digest)

    def line(self, run: Run) -> dict[str, Any]:
        """Returns everything that a run's result depends on."""
        given = {"setting": run.setting and run.setting.keys(), "participation": run.participation, "seed": run.seed}
        return {"task": self.name, "job": dict(self.keys), "base_digest": self.base_digest, **given}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--participation", nargs="*", choices=POPULATIONS, default=list(POPULATIONS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="run nothing; write the table from what is there")
    options = parser.parse_args()
    lines = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()] if RUNS.is_file() else []
    task = Task.of(options.job)
    planned = [
        Run(setting, participation, seed)
        for seed in range(options.seeds)
        for participation in options.participation
        for setting in SETTINGS
    ]
    missing = [run for run in planned if not any(line["basis"] == task.line(run) for line in lines)]
    for done, run in enumerate(missing):
        print(f"{done + 1} of {len(missing)}: {task.name}, {run}", flush=True)
        if options.dry:
            continue
        lines.append({"basis": task.line(run), "outcome": measure(task, run)})
        with RUNS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    publish(
        __file__,
        QUESTION,
        COLUMNS,
        list(table(lines)),
        [READING],
    )


def measure(task: Task, run: Run) -> dict[str, Any]:
    """Runs one federation from its beginning and returns its figures."""
    job = load_job(task.path, [*run.overrides(), "data.holdout=0", "export.formats=[]"])
    with tempfile.TemporaryDirectory() as folder:
        simulate(job, Path(folder), Silent())
        summary = read_summary(Path(folder))
    numbers = summary["adapter_parameters"] * job.federation.rounds * 10
    outcome = {
        "exact_match": summary["eval_after"]["exact_match"],
        "loss": summary["eval_after"]["loss"],
        "bits_up": 8 * summary["bytes"]["up"] / numbers,
        "bits_down": 8 * summary["bytes"]["down"] / numbers,
        "numbers": summary["adapter_parameters"],
        "seconds": summary["seconds"],
    }
    print(f"  {outcome}", flush=True)
    return outcome


def table(lines: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yields a row for each setting of each task and participation, in the order in which they were run."""
    groups: dict[tuple[str, str, str], dict[int, Mapping[str, float]]] = {}
    for line in lines:
        basis = line["basis"]
        key = basis["task"], basis["participation"], json.dumps(basis["setting"])
        groups.setdefault(key, {})[basis["seed"]] = line["outcome"]
    order = {name: place for place, name in enumerate(POPULATIONS)}
    for task, participation, text in sorted(groups, key=lambda key: (key[0], order[key[1]])):
        outcomes, exact = groups[task, participation, text], groups.get((task, participation, "null"), {})
        keys = json.loads(text)
        yield [task, participation, *_named(keys), f"{len(outcomes)}", *_figures(outcomes, exact, keys is None)]


def _named(keys: dict[str, Any] | None) -> list[str]:
    if keys is None:
        return ["float32", "", "", "none"]
    setting = Setting(**keys)
    form = setting.form if setting.density is None else f"{setting.form}, {setting.density:g}, with residuals"
    return [form, f"{setting.bits}", f"{setting.downlink_bits}", setting.presets()]


def _figures(outcomes: Mapping[int, Mapping[str, float]], exact: Mapping[int, Any], peer: bool) -> list[str]:
    def mean(key: str) -> float:
        return statistics.fmean(one[key] for one in outcomes.values())

    def gap(key: str) -> float:
        return statistics.fmean(one[key] - exact[seed][key] for seed, one in outcomes.items() if seed in exact)

    known = not peer and any(seed in exact for seed in outcomes)
    return [
        f"{mean('exact_match'):.1%}",
        f"{100 * gap('exact_match'):+.1f} points" if known else "",
        f"{mean('loss'):.3f}",
        f"{gap('loss'):+.3f}" if known else "",
        f"{mean('bits_up'):.2f}",
        f"{mean('bits_down'):.2f}",
        f"{(mean('bits_up') + mean('bits_down')) * mean('numbers') / 8e3:,.1f}",
    ]


if __name__ == "__main__":
    main()
