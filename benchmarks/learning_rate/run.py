"""At which learning rate does a short federation end best, by the base model's width and the kind of the adapter?

Each point is one federation in the clear with exact float32 updates, so that only the learning rate differs: 20 clients
of a Dirichlet partition, 5 a round, linear schedule. Loss on the held-out examples decides, since exact match is coarse
in short runs. Finished points are kept in points.jsonl beside this file and not computed again.

    python benchmarks/learning_rate/run.py                                      # the bundled demo
    python benchmarks/learning_rate/run.py --base DIR --train train.jsonl --evaluation eval.jsonl
    python benchmarks/learning_rate/run.py --table                              # write RESULTS.md again
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedtune.core.adapter.layout import AdapterKind
from fedtune.core.host.process import prepare_environment
from fedtune.core.job.job_file import load_job
from fedtune.core.job.learning_rates import default_learning_rate
from fedtune.core.job.settings import DEMO, Job
from fedtune.model.shape import shape_of
from fedtune.server.run_display import Silent
from fedtune.server.simulation.simulate import simulate

HERE = Path(__file__).parent
POINTS = HERE / "points.jsonl"
KINDS: tuple[AdapterKind, ...] = ("lora", "core")
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the default
RANKS = {"lora": 16, "core": 32}
FIXED = (
    "data.holdout=0.0",
    "training.batch_tokens=512",
    "federation.clients_per_round=5",
    "federation.evaluate_every=0",
    "secure_aggregation.enabled=false",
    "compression.preset=none",
)
OWN_DATA = ("data.clients=20", "data.partition=dirichlet:0.5", "data.sequence_length=128")
OF_DEMO = ("data.clients=20", "data.sequence_length=64")


@dataclass(frozen=True)
class Point:
    """A finished federation.

    Args:
        base: the base's name, the last part of its directory.
        loss, exact_match: on the held-out examples, after the last round.
    """

    base: str
    width: int
    kind: AdapterKind
    rank: int
    learning_rate: float
    rounds: int
    local_steps: int
    loss_before: float
    loss: float
    exact_match: float
    examples: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEMO, help="a Hugging Face directory")
    parser.add_argument("--train", default=DEMO, help="JSONL; with a base of one's own")
    parser.add_argument("--evaluation", default=DEMO, help="JSONL; with a base of one's own")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--multiples", nargs="+", type=float, default=list(MULTIPLES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--local-steps", type=int, default=8)
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="further overrides")
    parser.add_argument("--table", action="store_true", help="only write the table of the points so far")
    arguments = parser.parse_args()
    if not arguments.table:
        prepare_environment()
        jobs = _jobs(arguments)
        for number, job in enumerate(jobs, 1):
            _compute(job, f"{number}/{len(jobs)}")
    _write(read_points())


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    """Returns a job a point."""
    paths = [
        f"{key}={value if value == DEMO else Path(value).resolve()}"
        for key, value in (
            ("model.base", arguments.base),
            ("data.train", arguments.train),
            ("data.evaluation", arguments.evaluation),
        )
    ]
    data = OF_DEMO if arguments.train == DEMO else OWN_DATA
    work = (f"federation.rounds={arguments.rounds}", f"training.local_steps={arguments.local_steps}")
    width = shape_of(load_job(None, paths).model).width
    return [
        load_job(
            None,
            [
                *(*paths, *FIXED, *data, *work, f"adapter.kind={kind}", f"adapter.rank={RANKS[kind]}"),
                f"training.learning_rate={multiple * default_learning_rate(width, kind)}",
                *arguments.set,
            ],
        )
        for kind in arguments.kinds
        for multiple in arguments.multiples
    ]


def _compute(job: Job, place: str) -> None:
    """Computes a point, unless it is there."""
    base, work = Path(job.model.base).name, job.training
    identity = (base, job.adapter.kind, work.first_learning_rate, job.federation.rounds, work.steps)
    done = {(p.base, p.kind, p.learning_rate, p.rounds, p.local_steps) for p in read_points()}
    if identity in done:
        return
    print(f"{place}: {base}, {job.adapter.kind}, learning rate {work.first_learning_rate:g}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(job, Path(folder) / "run", Silent())
    before, after = summary["eval_before"], summary["eval_after"]
    point = Point(
        base,
        shape_of(job.model).width,
        job.adapter.kind,
        job.adapter.rank,
        work.first_learning_rate,
        job.federation.rounds,
        work.steps,
        before["loss"],
        after["loss"],
        after["exact_match"],
        after["examples"],
        round(time.monotonic() - started, 1),
    )
    with POINTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(point)) + "\n")
    print(f"  loss {before['loss']:.3f} -> {point.loss:.3f}, exact match {point.exact_match:.1%}", flush=True)


def read_points() -> list[Point]:
    """Returns the finished points."""
    if not POINTS.exists():
        return []
    return [Point(**json.loads(line)) for line in POINTS.read_text(encoding="utf-8").splitlines()]


def _write(points: Sequence[Point]) -> None:
    """Writes RESULTS.md: a row for each point, and the best of each base and kind in bold."""
    lines = [
        "# Learning rate by width and kind of adapter",
        "",
        (__doc__ or "").split("\n\n")[1].replace("\n", " "),
        "",
        f"Points of {datetime.date.today()}; the default is the one of `fedtune.core.job.learning_rates`.",
        "",
        "| base (width) | adapter | rounds × steps | learning rate | of default | before | loss | exact match | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = list(dict.fromkeys((p.width, p.base, p.kind, p.rounds, p.local_steps) for p in points))
    for group in sorted(groups):
        own = [p for p in points if (p.width, p.base, p.kind, p.rounds, p.local_steps) == group]
        best = min(own, key=lambda p: p.loss)
        for p in sorted(own, key=lambda p: p.learning_rate):
            bold = "**" if p is best else ""
            share = p.learning_rate / default_learning_rate(p.width, p.kind)
            lines.append(
                f"| {p.base} ({p.width}) | {p.kind}, rank {p.rank} | {p.rounds} × {p.local_steps} | "
                f"{p.learning_rate:g} | {share:g} | {p.loss_before:.3f} | {bold}{p.loss:.3f}{bold} | "
                f"{p.exact_match:.1%} | {p.seconds:.0f} |"
            )
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[6:]))


if __name__ == "__main__":
    main()
