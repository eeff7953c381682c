"""The table and the plot of benchmarks/real, from its finished runs.

The difference to float32 is paired: the same records, and the same seed, which draws the clients' data and the cohorts.
Its interval is the pigeonhole bootstrap's (Owen 2007), which draws seeds and records with replacement, independently of
each other, and so counts both as random; it is wide where there are few seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from book import Book
from matplotlib.figure import Figure
from rows import METHODS, REFERENCE, Draw, Row

HERE = Path(__file__).parent
PLOT = HERE / "results.svg"
RESAMPLES, LEVEL = 2000, 0.95
TARGET = 0.95  # of float32's last exact match on the validation records
NO_BYTES = ("centralised", "alone")
COLUMNS = (
    *("participation", "what is trained and sent", "rate", "seeds", "numbers", "exact match", "against float32 (95%)"),
    *("loss", "kB up", "kB down", "MB in all", "fewer", "MB to target", "fewer to target"),
)

Outcomes = dict[Draw, dict[str, Any]]


def publish(book: Book, rows: Sequence[Row]) -> None:
    """Prints the tables, writes them beside this program, and draws the plot."""
    measured = {row: outcomes for row in rows if (outcomes := book.outcomes(row))}
    text = ["# How few bytes reach the quality of float32 FedAvg on a real language model?", READING]
    for scene in dict.fromkeys(row.scene.name for row in measured):
        own = {row: outcomes for row, outcomes in measured.items() if row.scene.name == scene}
        text += [f"## {TITLES[scene]}", _facts(own), table(book, own), "By rounds, on the validation records:"]
        text.append(by_rounds(own))
        text.append(owed(book, [row for row in rows if row.scene.name == scene]))
    draw(measured, PLOT)
    text += [f"![Exact match against bytes]({PLOT.name})", __doc__ or ""]
    (HERE / "RESULTS.md").write_text("\n\n".join(part.strip() for part in text) + "\n", encoding="utf-8")
    print("\n\n".join(text[1:-2]))


TITLES = {"small": "A base of 5.6 million parameters", "smollm2": "SmolLM2-135M-Instruct"}
READING = (
    "`python benchmarks/real/run.py`, whose help explains the rows. The task: WordNet's glosses, to be sorted into its "
    "45 topics. `dirichlet:0.3:category` deals 24,000 of them to the clients, ten of which train in a round. Exact "
    "match and loss are of 2,500 further records, the learning rate (`rate`) and the rounds' curves of 1,000 others. "
    "kB are of a client-round: all payload bytes of a run over its client-rounds. The target is 95% of float32's last "
    "exact match at this participation."
)


def table(book: Book, measured: Mapping[Row, Outcomes]) -> str:
    """Returns the scene's table, by participation and then by bytes."""
    lines: list[Sequence[str]] = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in sorted(measured, key=lambda row: _place(row, measured[row])):
        reference = measured.get(Row(row.scene, REFERENCE, row.participation), {})
        lines.append(_cells(book, row, measured[row], reference))
    return _markdown(lines)


def by_rounds(measured: Mapping[Row, Outcomes]) -> str:
    """Returns exact match on the validation records after the same rounds, as means over the seeds."""
    rounds = [point["round"] for point in next(iter(next(iter(measured.values())).values()))["curve"]]
    lines: list[Sequence[str]] = [("participation", "what is trained and sent", *(f"round {each}" for each in rounds))]
    lines.append(["---"] * len(lines[0]))
    for row in sorted(measured, key=lambda row: _place(row, measured[row])):
        curves = [outcome["curve"] for outcome in measured[row].values()]
        means = [statistics.fmean(point["exact_match"] for point in points) for points in zip(*curves, strict=True)]
        lines.append((_part(row), METHODS[row.method].title, *(f"{mean:.1%}" for mean in means)))
    return _markdown(lines)


def owed(book: Book, rows: Sequence[Row]) -> str:
    """Returns sentences about rows, learning rates and seeds that are still to be measured; "" if there are none."""
    absent, partial = [], []
    for row in rows:
        done = len(book.outcomes(row))
        if not done:
            absent.append(row.name)
        elif done < len(row.draws) or not book.tuned(row):
            partial.append(row.name)
    texts = [
        f"{said}: {', '.join(name.partition('/')[2] for name in names)}."
        for said, names in (("Fewer seeds or rates than planned", partial), ("Not measured yet", absent))
        if names
    ]
    return " ".join(texts)


def paired(ours: Outcomes, reference: Outcomes) -> tuple[float, float, float] | None:
    """Returns the mean difference of exact match and its interval's ends; None where nothing can be paired.

    A seed counts where both have it.
    """
    pairs = [(ours[draw], reference[Draw(draw.seed)]) for draw in ours if Draw(draw.seed) in reference]
    if not pairs:
        return None
    differences = np.array([_right(one) - _right(other) for one, other in pairs])
    random = np.random.default_rng(0)
    seeds, examples = differences.shape
    means = [
        differences[random.integers(seeds, size=seeds)].mean(axis=0)[random.integers(examples, size=examples)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(differences.mean()), float(low), float(high)


def bytes_to(curve: Sequence[Mapping[str, float]], target: float) -> float | None:
    """Returns the bytes at which exact match first reaches the target, linear between evaluations; None if never."""
    for before, after in pairwise(curve):
        if after["exact_match"] >= target:
            share = (target - before["exact_match"]) / (after["exact_match"] - before["exact_match"])
            return before["bytes"] + max(share, 0.0) * (after["bytes"] - before["bytes"])
    return None


def draw(measured: Mapping[Row, Outcomes], path: Path) -> None:
    """Draws exact match on the validation records against all bytes so far, one panel a scene and participation."""
    import matplotlib

    matplotlib.rcParams |= {"svg.hashsalt": "real", "svg.fonttype": "none"}  # the same file for the same points
    panels = list(dict.fromkeys((row.scene.name, row.participation) for row in measured if row.method not in NO_BYTES))
    if not panels:
        return
    figure = Figure(figsize=(4.5 * len(panels), 4.5), layout="constrained")
    for panel, axes in zip(panels, np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), strict=True):
        for number, method in enumerate(name for name in METHODS if name not in NO_BYTES):
            lines = [
                outcomes
                for row, outcomes in measured.items()
                if (row.scene.name, row.participation) == panel and row.method == method
            ]
            for outcomes in lines:
                curves = [outcome["curve"][1:] for outcome in outcomes.values()]
                points = list(zip(*curves, strict=True))
                moved = [statistics.fmean(point["bytes"] for point in each) / 1e6 for each in points]
                match = [100 * statistics.fmean(point["exact_match"] for point in each) for each in points]
                axes.plot(moved, match, "o-", color=f"C{number}", label=METHODS[method].title, markersize=4)
        axes.set_xscale("log")
        axes.set_title(f"{panel[0]}, participation {panel[1]}")
        axes.set_xlabel("MB in both directions, so far")
        axes.grid(color="0.9")
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("exact match, % of the validation records")
    figure.savefig(path, metadata={"Date": None})


def _cells(book: Book, row: Row, outcomes: Outcomes, reference: Outcomes) -> Sequence[str]:
    done, tuned = list(outcomes.values()), book.tuned(row)
    rate = f"{book.best_rate(row):g}{'' if tuned else ' (not tuned yet)'}"
    gap = paired(outcomes, reference) if row.method != REFERENCE else None
    against = f"{100 * gap[0]:+.1f} ({100 * gap[1]:+.1f} … {100 * gap[2]:+.1f})" if gap else ""
    quality = [
        *(_part(row), METHODS[row.method].title, rate, _seeds(outcomes, reference), f"{done[0]['trained']:,}"),
        *(f"{_mean(done, 'exact_match'):.1%}", against, f"{_mean(done, 'loss'):.3f}"),
    ]
    if row.method in NO_BYTES:
        return [*quality, *[""] * (len(COLUMNS) - len(quality))]
    up, down = (statistics.fmean(one["bytes"][way] / one["client_rounds"] for one in done) for way in ("up", "down"))
    total = statistics.fmean(_total(one) for one in done)
    ours, theirs = (_to_target(part, reference) for part in (outcomes, reference))
    fewer = _mean_total(reference) / total if reference else None
    return [
        *quality,
        *(f"{up / 1e3:,.1f}", f"{down / 1e3:,.1f}", f"{total / 1e6:,.2f}", f"{fewer:.1f}x" if fewer else ""),
        f"{ours / 1e6:,.2f}" if ours else "not reached",
        f"{theirs / ours:.1f}x" if ours and theirs else "",
    ]


def _seeds(outcomes: Outcomes, reference: Outcomes) -> str:
    """Returns the number of trainings, and how many of them are paired with the reference where not all are."""
    pairs = sum(Draw(draw.seed) in reference for draw in outcomes)
    return f"{len(outcomes)}" if pairs == len(outcomes) else f"{len(outcomes)}, {pairs} paired"


def _to_target(outcomes: Outcomes, reference: Outcomes) -> float | None:
    if not reference:
        return None
    target = TARGET * statistics.fmean(one["curve"][-1]["exact_match"] for one in reference.values())
    found = [bytes_to(one["curve"], target) for one in outcomes.values()]
    return statistics.fmean(each for each in found if each is not None) if None not in found else None


def _facts(measured: Mapping[Row, Outcomes]) -> str:
    done = [outcome for outcomes in measured.values() for outcome in outcomes.values()]
    commits, precisions = (sorted({one[key] for one in done}) for key in ("commit", "precision"))
    minutes = sum(one["seconds"] for one in done) / 60
    return (
        f"Arithmetic {', '.join(precisions)}; {len(done)} runs of {minutes / len(done):.1f} minutes on average; code "
        f"of {', '.join(commits)}."
    )


def _right(outcome: Mapping[str, Any]) -> np.ndarray:
    bits = np.frombuffer(bytes.fromhex(outcome["right"]), dtype=np.uint8)
    return np.unpackbits(bits, count=outcome["examples"]).astype(np.float64)


def _place(row: Row, outcomes: Outcomes) -> tuple[Any, ...]:
    bound = row.method in NO_BYTES
    order = ("1.0", "0.5", "0.1", "once").index(row.participation)
    return (bound, order, list(METHODS).index(row.method) if bound else -_mean_total(outcomes))


def _part(row: Row) -> str:
    return "" if row.method in NO_BYTES else row.participation


def _mean(done: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(one[key] for one in done)


def _total(outcome: Mapping[str, Any]) -> float:
    return float(outcome["bytes"]["up"] + outcome["bytes"]["down"])


def _mean_total(outcomes: Outcomes) -> float:
    return statistics.fmean(_total(one) for one in outcomes.values()) if outcomes else 0.0


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
