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
    "1,000 clients, 100 of them in a round, each in two of 20 rounds; δ = 5e-4 for one client's whole data; the server "
    "chooses cohorts, so nothing is claimed from sampling. Of a round's clients 10% may vanish and 5% collude, which "
    "devices make up for by more noise. A trusted server and Flower's wrapper add as much to a mean as the devices' "
    "noise comes to; their own ε, below the job's, is that of this noise. Cohorts, seeds and clips are the same in all "
    "rows. Bits are those of a client's reply for each trained number; with Flower's wrapper updates "
    "travel as float32."
)
Key = tuple[str, str, str, float, int]


def publish(lines: Sequence[Mapping[str, Any]]) -> None:
    """Prints the table, writes it beside this program, and draws the plot."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for line in lines:
        row = line["basis"]["row"]
        key = row["task"], row["kind"], row["noise"], row["epsilon"], row["clients"]
        groups.setdefault(key, []).append(line["outcome"])
    table = [COLUMNS, ("---",) * len(COLUMNS)]
    table += [
        _cells(key, groups[key], groups.get((key[0], key[1], "none", 0.0, 100), []))
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
    """Writes what the devices' noise cost, by its size, to where `fedtune privacy plan` reads it."""
    losses: dict[str, list[tuple[float, float]]] = {}
    for (task, kind, noise, _, _), outcomes in groups.items():
        without = groups.get((task, kind, "none", 0.0, 100))
        if kind == "core" and noise in ("distributed", "central") and without:
            lost = 100 * (_mean(without, "exact_match") - _mean(outcomes, "exact_match"))
            losses.setdefault(TITLES[task], []).append((round(outcomes[0]["noise"], 4), round(lost, 1)))
    MEASURED.write_text(json.dumps({task: sorted(pairs) for task, pairs in sorted(losses.items())}, indent=1) + "\n")


def _place(key: Key) -> tuple[Any, ...]:
    task, kind, noise, epsilon, clients = key
    return task, kind, clients, ("none", "distributed", "central", "flower").index(noise), -epsilon


def _cells(key: Key, outcomes: Sequence[Mapping[str, Any]], without: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    task, kind, noise, epsilon, clients = key
    scores, first = [one["exact_match"] for one in outcomes], outcomes[0]
    gap = _mean(outcomes, "exact_match") - _mean(without, "exact_match") if without and noise != "none" else None
    return (
        *(TITLES[task], TITLES[kind], f"{first['numbers']:,}", TITLES[noise]),
        f"{clients} of {10 * clients:,}" if epsilon else "",
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
    """Draws exact match against ε, a panel for each task."""
    tasks = [task for task in ("demo", "wordnet") if any(key[0] == task for key in groups)]
    figure = Figure(figsize=(5.2 * len(tasks), 4.0), layout="constrained")
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), place + 1)
        curve = sorted((key[3], each) for key, each in groups.items() if key[:3] == (task, "core", "distributed"))
        scores = [[100 * one["exact_match"] for one in each] for _, each in curve]
        epsilons = [epsilon for epsilon, _ in curve]
        axes.plot(
            epsilons, [statistics.fmean(each) for each in scores], "o-", color="#1f5fa8", label="noise of the devices"
        )
        axes.fill_between(
            epsilons, [min(each) for each in scores], [max(each) for each in scores], color="#1f5fa8", alpha=0.2
        )
        for noise, mark, color in (("central", "s", "#c25b12"), ("flower", "^", "#3c8a3f")):
            if outcomes := groups.get((task, "core", noise, 8.0, 100)):
                axes.plot(
                    [8.0],
                    [100 * _mean(outcomes, "exact_match")],
                    mark,
                    color=color,
                    mfc="none",
                    ms=9,
                    label=TITLES[noise],
                )
        if outcomes := groups.get((task, "core", "none", 0.0, 100)):
            axes.axhline(100 * _mean(outcomes, "exact_match"), color="#555555", ls="--", label="without privacy")
        if not curve:
            continue
        axes.set_xscale("log", base=2)
        axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        axes.set(xlabel="ε of one client's data", ylabel="exact match, %", title=TITLES[task], ylim=(0, 100))
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    publish([json.loads(line) for line in (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()])
