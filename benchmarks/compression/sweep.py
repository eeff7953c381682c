"""How few bytes reach the exact match of uncompressed training on the demo, by form, bits, density and feedback?

Every point is one federation, run by `fedtune.server.simulation.simulate` on the job of benchmarks/demo and read from
its summary.json: final exact match on the server's evaluation set, and every payload byte of the run, up and down,
evaluation messages included. Its peer is the same federation with float32 A and B both ways, at the same seed. A seed
is `training.seed`: the adapter's start, the households' data and every random draw follow from it.

    python benchmarks/compression/sweep.py              # runs what is missing: about 95 seconds of one core a run
    python benchmarks/compression/sweep.py --dry        # prints what is missing, and writes table and plot again

A finished run is one line of sweep.jsonl, which is kept: a second call continues where the first one stopped, and
repeats only runs whose job, settings or base model have changed since.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tables import publish

from fedtune.core.codec.uplink import Compression
from fedtune.core.job.job_file import load_job
from fedtune.model.base_model import load_base
from fedtune.server.run_directory import read_summary
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import simulate

HERE = Path(__file__).parent
JOB = HERE.parent / "demo" / "job.toml"
RUNS = HERE / "sweep.jsonl"
PLOT = HERE / "sweep.svg"
QUESTION = "How few bytes reach the exact match of uncompressed training on the demo?"
CLEAR = ("secure_aggregation.enabled=false",)  # masks change no value, and benchmarks/demo measures their cost
SEEDS = (0, 1, 2)
GOALS = {"sparse": 40, "ring": 20}  # fp32 FedAvg's bytes over a form's must reach this
TOLERANCE = 0.01
READING = (
    "Ten households, all of them in each of 16 rounds. MB are of a whole run: all payload bytes up, and down. The goal "
    "is at least 40 times fewer bytes than fp32 FedAvg for the form sparse and 20 times fewer for the form ring, with "
    "the final exact match within one point of the uncompressed run with the same seed, on average over all seeds. Of "
    "240 evaluation examples, one is 0.4 points."
)


@dataclass(frozen=True)
class Setting:
    """A setting of all keys of [compression], so that a changed preset changes no recorded line."""

    form: str
    bits: int
    density: float
    error_feedback: bool = True
    downlink_bits: int = 2
    rotation: bool = True

    def keys(self) -> dict[str, Any]:
        """Returns the keys of [compression]; rotation exists for the ring only."""
        keys = asdict(self)
        if self.form != "ring" or self.rotation:
            del keys["rotation"]
        return keys

    def presets(self) -> list[str]:
        """Returns the names of the presets with this setting."""
        candidates = {name: {"preset": name, "form": self.form} for name in ("balanced", "extreme")}
        return [name for name, keys in candidates.items() if meaning(keys) == meaning(self.keys())]


def overrides(keys: dict[str, Any]) -> list[str]:
    """Returns keys of [compression] as overrides for `load_job`."""
    return [f"compression.{key}={json.dumps(value)}" for key, value in keys.items()]


def meaning(keys: dict[str, Any]) -> Compression:
    return Compression.of(load_job(JOB, [*CLEAR, *overrides(keys)]))


UNCOMPRESSED = None
SETTINGS: tuple[Setting | None, ...] = (
    UNCOMPRESSED,
    Setting("sparse", 3, 0.07),
    Setting("ring", 2, 0.4),
    Setting("sparse", 3, 0.03),
    Setting("ring", 2, 0.25),
    # Neighbours of these settings, one key at a time.
    Setting("sparse", 3, 0.07, error_feedback=False),
    Setting("ring", 2, 0.4, error_feedback=False),
    Setting("ring", 2, 0.4, rotation=False),
    Setting("sparse", 2, 0.07),
    Setting("sparse", 4, 0.07),
    Setting("ring", 3, 0.25),
    Setting("ring", 4, 0.25),
    Setting("sparse", 3, 0.07, downlink_bits=3),
    Setting("sparse", 3, 0.03, error_feedback=False),
    Setting("ring", 2, 0.25, error_feedback=False),
    Setting("sparse", 3, 0.1),
    Setting("ring", 1, 0.4),
)


@dataclass(frozen=True)
class Run:
    """One planned federation: a setting (None is float32) and a seed."""

    setting: Setting | None
    seed: int

    def compression(self) -> dict[str, Any]:
        return {"preset": "none"} if self.setting is None else self.setting.keys()

    def title(self) -> str:
        return f"seed {self.seed}, {', '.join(f'{key} {value}' for key, value in self.compression().items())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="run nothing; write table and plot from what is there")
    options = parser.parse_args()
    book = Book.open(RUNS)
    missing = [run for run in planned() if book.outcome(run) is None]
    if options.dry:
        print("\n".join(f"missing: {run.title()}" for run in missing))
    else:
        for done, run in enumerate(missing):
            print(f"run {done + 1} of {len(missing)}: {run.title()}", flush=True)
            book.add(run)
    report(book)


def planned() -> list[Run]:
    """Returns the sweep's runs, each once, setting by setting, so that a partial sweep has all seeds of a setting."""
    return [Run(setting, seed) for setting in SETTINGS for seed in SEEDS]


class Book:
    """The finished runs: lines of a file, each with all its inputs."""

    def __init__(self, path: Path, base_digest: str, lines: list[dict[str, Any]]) -> None:
        self._path = path
        self._job = tomllib.loads(JOB.read_text(encoding="utf-8"))
        self._base_digest = base_digest
        self._lines = lines

    @classmethod
    def open(cls, path: Path) -> Book:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return cls(path, load_base(load_job(JOB).model).digest, [json.loads(line) for line in text.splitlines()])

    def outcome(self, run: Run) -> dict[str, Any] | None:
        """Returns a finished run's results; None if it still has to be run."""
        basis = self._basis(run)
        return next((line["outcome"] for line in self._lines if line["basis"] == basis), None)

    def add(self, run: Run) -> None:
        """Runs a federation and writes its line."""
        line = {"basis": self._basis(run), "outcome": measure(run)}
        self._lines.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _basis(self, run: Run) -> dict[str, Any]:
        return {
            "compression": run.compression(),
            "seed": run.seed,
            "job": self._job,
            "base_digest": self._base_digest,
        }


class _Rounds(Silent):
    """A display with one growing line a run: the share of rounds that are done."""

    def begin(self, done: int, rounds: int, cohort: int, moved: int) -> None:
        del done, cohort, moved
        self._rounds, self._started = rounds, time.monotonic()

    def round(self, record: Any) -> None:
        seconds = time.monotonic() - self._started
        end = "\n" if record.round == self._rounds else "\r"
        print(f"  round {record.round}/{self._rounds}, {seconds:.0f} s", end=end, flush=True)


def measure(run: Run) -> dict[str, Any]:
    """Runs one federation from its beginning and returns its summary."""
    fixed = [*CLEAR, "federation.evaluate_every=0", f"training.seed={run.seed}"]
    job = load_job(JOB, fixed + overrides(run.compression()))
    with tempfile.TemporaryDirectory() as folder:
        simulate(job, Path(folder), _Rounds())
        summary = read_summary(Path(folder))
    print(f"  exact match {summary['eval_after']['exact_match']:.1%}, {summary['traffic_ratio']:.1f}x", flush=True)
    return {
        "exact_match": summary["eval_after"]["exact_match"],
        "loss": summary["eval_after"]["loss"],
        "held_out_exact_match": summary["client_evaluation"]["exact_match"],
        "bytes": summary["bytes"],
        "fp32_fedavg_bytes": summary["fp32_fedavg_bytes"],
        "seconds": summary["seconds"],
        "adapter_digest": summary["adapter_digest"],
    }


@dataclass(frozen=True)
class Point:
    """One setting's results over its seeds.

    Args:
        seeds: the number of seeds.
        exact_match, worst, held_out: mean and lowest final exact match; the mean on the clients' own held-out data.
        gap: mean difference of exact match to uncompressed training with the same seed.
        up, down: mean bytes of a whole run.
        ratio: bytes of fp32 FedAvg over all bytes, summed over the seeds.
    """

    setting: Setting | None
    seeds: int
    exact_match: float
    worst: float
    held_out: float
    gap: float
    up: float
    down: float
    ratio: float

    @property
    def reaches_goal(self) -> bool:
        if self.setting is None or self.seeds < len(SEEDS):
            return False
        return self.gap >= -TOLERANCE and self.ratio >= GOALS[self.setting.form]


def points(book: Book) -> Iterator[Point]:
    """Returns the settings in the table's order: uncompressed, then by form, feedback and bytes."""
    runs: dict[Setting | None, dict[int, dict[str, Any]]] = {}
    for run in planned():
        outcome = book.outcome(run)
        if outcome is not None:
            runs.setdefault(run.setting, {})[run.seed] = outcome
    plain = runs.get(UNCOMPRESSED, {})
    found = [_point(setting, outcomes, plain) for setting, outcomes in runs.items() if outcomes.keys() <= plain.keys()]
    yield from sorted(found, key=lambda point: _rank(point))


def _rank(point: Point) -> tuple[bool, str, bool, float]:
    setting = point.setting
    if setting is None:
        return (False, "", False, 0.0)
    return (True, setting.form, not setting.error_feedback, -point.up - point.down)


def _point(setting: Setting | None, outcomes: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]]) -> Point:
    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    values = outcomes.values()
    return Point(
        setting,
        len(outcomes),
        mean(one["exact_match"] for one in values),
        min(one["exact_match"] for one in values),
        mean(one["held_out_exact_match"] for one in values),
        mean(one["exact_match"] - plain[seed]["exact_match"] for seed, one in outcomes.items()),
        mean(one["bytes"]["up"] for one in values),
        mean(one["bytes"]["down"] for one in values),
        sum(one["fp32_fedavg_bytes"] for one in values) / sum(one["bytes"]["total"] for one in values),
    )


def report(book: Book) -> None:
    """Prints the table, writes it beside this program, and draws it."""
    measured = list(points(book))
    columns = ["form", "bits", "density", "else", "preset", "seeds", "exact match", "lowest", "against uncompressed"]
    columns += ["clients' held-out", "MB up", "MB down", "fp32 FedAvg / total", "goal"]
    publish(
        __file__,
        QUESTION,
        columns,
        [_cells(point) for point in measured],
        [READING, f"![Exact match against bytes]({PLOT.name})"],
    )
    draw(measured, PLOT)


def _cells(point: Point) -> Sequence[str]:
    setting = point.setting
    named = ["float32", "", "", "", "none"] if setting is None else _named(setting)
    return [
        *named,
        f"{point.seeds}",
        f"{point.exact_match:.1%}",
        f"{point.worst:.1%}",
        f"{100 * point.gap:+.1f} points" if setting else "",
        f"{point.held_out:.1%}",
        f"{point.up / 1e6:.2f}",
        f"{point.down / 1e6:.2f}",
        f"{point.ratio:.1f}x",
        "reached" if point.reaches_goal else "",
    ]


def _named(setting: Setting) -> list[str]:
    rest = ", ".join(text for text in _differences(setting) if text)
    return [setting.form, f"{setting.bits}", f"{setting.density:g}", rest, ", ".join(setting.presets())]


def _differences(setting: Setting) -> tuple[str, str, str]:
    """Returns in words how a setting differs from most; empty if it does not."""
    return (
        "" if setting.error_feedback else "no error feedback",
        "" if setting.rotation else "no rotation",
        "" if setting.downlink_bits == Setting.downlink_bits else f"{setting.downlink_bits} bits down",
    )


def draw(measured: Sequence[Point], path: Path) -> None:
    """Draws exact match against bytes: marker by form, colour by bits, fill by feedback, large means over all seeds."""
    import matplotlib

    matplotlib.rcParams |= {"svg.hashsalt": "sweep", "svg.fonttype": "none"}  # the same file for the same points
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    markers, colours = {"sparse": "o", "ring": "s"}, {1: "C3", 2: "C1", 3: "C2", 4: "C0"}
    axes.axhline(0, color="0.4", linewidth=1)
    axes.axhspan(-100 * TOLERANCE, 0, color="0.9")
    for form, goal in GOALS.items():
        axes.axvline(goal, color="0.7", linewidth=1, linestyle=":")
        axes.annotate(f" goal, {form}", (goal, 0.01), xycoords=("data", "axes fraction"), rotation=90, color="0.5")
    for point in measured:
        setting = point.setting
        if setting is None:
            continue
        colour, place = colours[setting.bits], (point.ratio, 100 * point.gap)
        axes.plot(
            *([value] for value in place),
            markers[setting.form],
            markersize=9 if point.seeds > 1 else 6,
            markeredgecolor=colour,
            markerfacecolor=colour if setting.error_feedback else "none",
        )
        label = ", ".join(text for text in (f"{setting.density:g}", *_differences(setting)[1:]) if text)
        axes.annotate(label, place, (5, -9), textcoords="offset points", size=7)
    axes.set_xscale("log")
    ticks = [15, 20, 25, 30, 40, 50, 60, 80]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yscale("symlog", linthresh=2)
    losses = [1, 0, -1, -2, -5, -10, -20, -50, -100]
    axes.set_yticks(losses, [f"{loss:+d}" if loss else "0" for loss in losses])
    axes.set_yticks([], minor=True)
    axes.set_ylim(min([-2.5, *(140 * point.gap for point in measured)]), 1.5)
    axes.set_xlabel("all bytes, up and down: times fewer than fp32 FedAvg of A and B")
    axes.set_ylabel("final exact match, points from uncompressed")
    legend = [
        *(Line2D([], [], marker=m, color="0.3", linestyle="", label=form) for form, m in markers.items()),
        *(
            Line2D([], [], marker="o", color=c, linestyle="", label=f"{b} bits" if b > 1 else "1 bit")
            for b, c in colours.items()
        ),
        Line2D([], [], marker="o", color="0.3", fillstyle="none", linestyle="", label="no error feedback"),
        Line2D([], [], color="0.4", linewidth=1, label="uncompressed; shaded: one point less"),
    ]
    axes.legend(handles=legend, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
