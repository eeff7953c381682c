"""The table and the plot of benchmarks/privacy, from its finished runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedtune.server.privacy_losses import MEASURED

HERE = Path(__file__).parent
PLOT = HERE / "curves.svg"
COLUMNS = (
    *(
        "task",
        "adapter",
        "numbers",
        "noise",
        "as of a round of",
        "clip",
        "ε of the job",
        "ε if only the sum is seen",
        "seeds",
        "exact match",
    ),
    *("lowest to highest", "against none", "loss", "bits up"),
)
TITLES = {
    "none": "none",
    "distributed": "devices'",
    "central": "a trusted server's",
    "flower": "Flower's wrapper",
    "core": "core",
    "lora": "LoRA",
    "ffa": "FFA-LoRA",
    "demo": "demo",
    "wordnet": "WordNet",
}
READING = (
    "1,000 clients, 100 of them in a round, each in two of 20 rounds; δ = 5e-4 for one client's whole data; the "
    "server chooses cohorts, so nothing is claimed from sampling. Of a round's clients 10% may vanish and 5% "
    "collude, which devices make up for by more noise. A trusted server and Flower's wrapper add as much to a mean "
    "as the devices' noise comes to; their own ε, below the job's, is that of this noise. With more than 100 "
    "clients only the noise is as of so large a round: 100 train. The clip is a share of the largest norm that a "
    "round's steps can reach. Cohorts and seeds are the same in all rows. Bits are those of a client's reply for "
    "each trained number; with Flower's wrapper updates travel as float32."
)
CLIP = 0.25
Key = tuple[str, str, str, float, int, float]


def publish(lines: Sequence[Mapping[str, Any]]) -> None:
    """Prints the table, writes it beside this program, and draws the plot."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for line in lines:
        row = line["basis"]["row"]
        key = row["task"], row["kind"], row["noise"], row["epsilon"], row["clients"], row["clip"]
        groups.setdefault(key, []).append(line["outcome"])
    table = [COLUMNS, ("---",) * len(COLUMNS)]
    table += [
        _cells(key, groups[key], groups.get((key[0], key[1], "none", 0.0, 100, CLIP), []))
        for key in sorted(groups, key=_place)
    ]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    print(text)
    draw(groups, PLOT)
    write_losses(groups)
    title = "# What does differential privacy of every client cost in quality?"
    parts = [title, "`python benchmarks/privacy/run.py`, whose help explains the rows.", text, READING]
    parts += [
        f"![Exact match against ε]({PLOT.name})",
        (HERE / "cost.md").read_text() if (HERE / "cost.md").is_file() else "",
    ]
    (HERE / "RESULTS.md").write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")


def write_losses(groups: Mapping[Key, Sequence[Mapping[str, Any]]]) -> None:
    """Writes what noise cost, by its size and with the best clip, to where `fedtune privacy plan` reads it."""
    losses: dict[str, dict[float, float]] = {}
    scores: dict[str, float] = {}
    for (task, kind, noise, _, _, _), outcomes in groups.items():
        without = groups.get((task, kind, "none", 0.0, 100, CLIP))
        if kind == "core" and noise in ("distributed", "central") and without:
            lost = round(100 * (_mean(without, "exact_match") - _mean(outcomes, "exact_match")), 1)
            found = losses.setdefault(TITLES[task], {})
            scores[TITLES[task]] = round(100 * _mean(without, "exact_match"), 1)
            size = round(outcomes[0]["noise"], 4)
            found[size] = min(lost, found.get(size, lost))
    table = {task: {"without": scores[task], "lost": sorted(found.items())} for task, found in sorted(losses.items())}
    MEASURED.write_text(json.dumps(table, indent=1) + "\n")


def _place(key: Key) -> tuple[Any, ...]:
    task, kind, noise, epsilon, clients, clip = key
    return task, kind, clients, clip, ("none", "distributed", "central", "flower").index(noise), -epsilon


def _cells(key: Key, outcomes: Sequence[Mapping[str, Any]], without: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    task, kind, noise, epsilon, clients, clip = key
    scores, first = [one["exact_match"] for one in outcomes], outcomes[0]
    gap = _mean(outcomes, "exact_match") - _mean(without, "exact_match") if without and noise != "none" else None
    return (
        *(TITLES[task], TITLES[kind], f"{first['numbers']:,}", TITLES[noise]),
        f"{clients} of {10 * clients:,}" if epsilon else "",
        f"{clip:g}" if epsilon else "",
        f"{epsilon:g}" if epsilon else "∞",
        f"{first['epsilon']:.2f}" if noise in ("central", "flower") and clients == 100 else "",
        f"{len(outcomes)}",
        f"{_mean(outcomes, 'exact_match'):.1%}",
        f"{min(scores):.1%} to {max(scores):.1%}" if len(scores) > 1 else "",
        "" if gap is None else f"{100 * gap:+.1f} points",
        f"{_mean(outcomes, 'loss'):.3f}",
        f"{8 * _mean(outcomes, 'bytes_up') / first['numbers']:.1f}",
    )


def _mean(outcomes: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(one[key] for one in outcomes)


def draw(groups: Mapping[Key, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draws exact match against ε on the demo, and against the size of rounds on WordNet."""
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    by_epsilon, by_clients = figure.subplots(1, 2)
    _draw_line(by_epsilon, _curve(groups, "demo", ("distributed",), 3, CLIP), "#1f5fa8", "noise of the devices")
    for noise, mark, color in (("central", "s", "#c25b12"), ("flower", "^", "#3c8a3f")):
        if outcomes := groups.get(("demo", "core", noise, 8.0, 100, CLIP)):
            place = [100 * _mean(outcomes, "exact_match")]
            by_epsilon.plot([8.0], place, mark, color=color, mfc="none", ms=9, label=TITLES[noise])
    by_epsilon.set(xlabel="ε of one client's data", title="demo, 100 of 1,000 clients a round")
    for clip, color in ((CLIP, "#1f5fa8"), (0.5, "#c25b12")):
        curve = _curve(groups, "wordnet", ("distributed", "central"), 4, clip)
        _draw_line(by_clients, curve, color, f"ε = 8, clip {clip:g}")
    by_clients.set(xlabel="clients of a round, of ten times as many", title="WordNet")
    for axes, task in ((by_epsilon, "demo"), (by_clients, "wordnet")):
        if outcomes := groups.get((task, "core", "none", 0.0, 100, CLIP)):
            axes.axhline(100 * _mean(outcomes, "exact_match"), color="#555555", ls="--", label="without privacy")
        axes.set(ylabel="exact match, %", ylim=(0, 103))
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def _curve(
    groups: Mapping[Key, Sequence[Mapping[str, Any]]], task: str, noises: Sequence[str], place: int, clip: float
) -> dict[float, list[float]]:
    """Returns the value at a place of the key -> exact match in percent, one for each seed; the first noise counts."""
    curve: dict[float, list[float]] = {}
    for noise in noises:
        for key, outcomes in groups.items():
            if key[:3] == (task, "core", noise) and key[5] == clip and (place == 3 or key[3] == 8.0):
                curve.setdefault(float(key[place]), [100 * one["exact_match"] for one in outcomes])
    return dict(sorted(curve.items()))


def _draw_line(axes: Any, curve: Mapping[float, Sequence[float]], color: str, label: str) -> None:
    places = list(curve)
    axes.plot(places, [statistics.fmean(each) for each in curve.values()], "o-", color=color, label=label)
    lowest, highest = [min(each) for each in curve.values()], [max(each) for each in curve.values()]
    axes.fill_between(places, lowest, highest, color=color, alpha=0.2)
    axes.set_xscale("log", base=2)
    known = sorted({*axes.get_xticks(), *places} if len(axes.lines) > 1 else places)
    axes.set_xticks(known, [f"{each:g}" for each in known])


if __name__ == "__main__":
    publish([json.loads(line) for line in (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()])
