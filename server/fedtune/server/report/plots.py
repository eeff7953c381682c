"""Plots of a run. Each function returns one plot, or None if the run lacks the data for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.core.metrics import METRICS
from fedtune.server.report.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Plot,
    byte_axis,
    curve,
    draw,
    note_absurd,
    plausible,
    quantile,
    round_axis,
    share_axis,
)
from fedtune.server.report.reading import Client, Round, Run, clean_line, names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED_CLIENTS = 40  # more cannot be told apart: a distribution is drawn instead
DRAWN_CLIENTS = 60  # rows of a time line without names
TIMED_ROUNDS = 24
LABELLED_ROUNDS = 6  # of more rounds the time line has room for the numbers only
NAME_LENGTH = 18
ROW_INCHES = 0.2
_SHORTEST_SECONDS = 1e-3  # an axis needs some length
HEAD_INCHES = 0.9  # axis, its label and the legend
LOGARITHMIC_FROM = 20.0  # how many times less traffic than the baseline; a linear axis would show a flat line


def run_plots(run: Run) -> list[Plot]:
    """Draws every plot for which the run has data."""
    if not run.rounds:
        return []
    plots = (loss, own_metric, exact_match, client_scores, client_losses, traffic, cumulative_traffic, time_line)
    return [plot for plot in (make(run) for make in plots) if plot is not None]


def loss(run: Run) -> Plot:
    """Draws training and evaluation loss by round."""

    def paint(axes: Axes) -> None:
        _mark_aborted(axes, run.rounds)
        train, absurd = plausible(line.train_loss for line in run.rounds)
        curve(axes, [line.round for line in run.rounds], train, BLUE, "training")
        if run.evaluations:
            score, more = plausible(evaluation.loss for _, evaluation in run.evaluations)
            curve(axes, [number for number, _ in run.evaluations], score, ORANGE, "evaluation")
            absurd += more
        note_absurd(axes, absurd)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("nats per token")
        _rounds_from_zero(axes, run)

    words = (
        "How surprised the model is by the right answer; lower is better. Training: mean over the clients that took "
        "part, on their own data, while they trained. Evaluation: the server's examples, which nobody trained on, "
        "after the round."
    )
    return draw("Loss", words + _on_aborted(run), paint)


def exact_match(run: Run) -> Plot | None:
    """Draws exact match by round, on the server's data and on the clients'."""
    held_out = [(line.round, score) for line in run.rounds if (score := line.held_out)]
    if not run.evaluations and not held_out:
        return None

    def paint(axes: Axes) -> None:
        for scores, colour, label in (
            (run.evaluations, ORANGE, "server's examples"),
            (held_out, GREEN, "clients' held-out examples"),
        ):
            if scores:
                rounds, shares = zip(*((number, score.exact_match) for number, score in scores), strict=True)
                curve(axes, rounds, shares, colour, label)
        share_axis(axes)
        _rounds_from_zero(axes, run)

    words = (
        "The share of examples that the model answers right to the last token; higher is better. Neither the server's "
        "examples nor those that clients hold back are trained on."
    )
    return draw("Exact match", words, paint)


def own_metric(run: Run) -> Plot | None:
    """Draws the metric of generated answers that the run is judged by, if it is."""
    key = run.metric
    scores = [(number, value) for number, score in run.evaluations if (value := score.value(key)) is not None]
    metric = METRICS[key]
    if not metric.generated or not scores:
        return None

    def paint(axes: Axes) -> None:
        rounds, shares = zip(*scores, strict=True)
        curve(axes, rounds, shares, ORANGE, "server's examples")
        share_axis(axes)
        _rounds_from_zero(axes, run)

    words = f"{metric.title} says {metric.meaning}; higher is better. The server's examples are not trained on."
    return draw(metric.title, words, paint)


def client_scores(run: Run) -> Plot | None:
    """Draws the last exact match of every client on its holdout: bars, or a histogram for many clients."""
    last = run.held_out
    if last is None:
        return None
    scores = sorted((part.eval.exact_match, part.id) for part in last.client_evaluations if part.eval)
    silent = len(last.client_evaluations) - len(scores)
    mean = sum(score for score, _ in scores) / len(scores)
    asked = f"after round {last.round}" + (f"; {silent} of those asked gave no score" if silent else "")
    if len(scores) > NAMED_CLIENTS:
        words = (
            f"How many clients reach which exact match on the examples they hold back, {asked}. A narrow hill far to "
            f"the right is best. The line is the mean over {len(scores):,} clients, {mean:.0%}."
        )
        return draw("Exact match by client", words, lambda axes: _score_histogram(axes, [s for s, _ in scores], mean))
    words = (
        f"Each client's exact match on the examples it holds back, {asked}. Short bars are clients that the common "
        f"adapter serves badly. The line is the mean, {mean:.0%}."
    )
    height = HEAD_INCHES + ROW_INCHES * max(len(scores), 6)
    return draw("Exact match by client", words, lambda axes: _score_bars(axes, scores, mean), height)


def client_losses(run: Run) -> Plot | None:
    """Draws the training loss of every client by round: lines, or quantile bands for many clients."""
    everyone = names(run.rounds)
    if not any(client.loss is not None for line in run.rounds for client in line.survivors):
        return None
    if len(everyone) > NAMED_CLIENTS:
        words = (
            "How training loss is spread over a round's clients. Half of them lie in the dark band, four fifths in "
            "the light one; the line is the median. A band that stays wide means that clients differ."
        )
        return draw("Training loss by client", words, lambda axes: _loss_bands(axes, run.rounds))
    words = (
        "Each thin line is one client's loss on its own data while it trained; the thick one is their mean. A line "
        "that stays above the others is a client whose data is harder, or different."
    )
    return draw("Training loss by client", words, lambda axes: _loss_lines(axes, run.rounds, everyone))


def traffic(run: Run) -> Plot:
    """Draws the bytes up and down, by round."""

    def paint(axes: Axes) -> None:
        # One outline for all rounds: a bar for each would make the page of a long run heavy.
        edges = [run.rounds[0].round - 0.5, *(line.round + 0.5 for line in run.rounds)]
        down = [line.traffic.down for line in run.rounds]
        both = [line.traffic.down + line.traffic.up for line in run.rounds]
        axes.stairs(down, edges, fill=True, color=BLUE, alpha=0.75, label="down, to clients")
        axes.stairs(both, edges, baseline=down, fill=True, color=ORANGE, alpha=0.75, label="up, from clients")
        axes.set_ylim(bottom=0)
        byte_axis(axes)
        round_axis(axes, run.rounds[0].round, run.rounds[-1].round)

    words = (
        "What travelled in each round, counted where payloads are written: the adapter down to the clients, their "
        "updates up. What clients receive and send in order to evaluate is counted too."
    )
    return draw("Bytes by round", words, paint)


def cumulative_traffic(run: Run) -> Plot:
    """Draws the cumulative bytes, against those of fp32 FedAvg if the summary has them."""
    moved = list(itertools.accumulate(line.traffic.up + line.traffic.down for line in run.rounds))
    baseline = _baseline_by_round(run)
    logarithmic = bool(baseline) and baseline[-1] > LOGARITHMIC_FROM * max(moved[-1], 1)

    def paint(axes: Axes) -> None:
        rounds = [line.round for line in run.rounds]
        if baseline:
            curve(axes, rounds, baseline, GREY, "fp32 FedAvg", dash="--")
        curve(axes, rounds, moved, BLUE, "this run")
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        byte_axis(axes)
        round_axis(axes, rounds[0], rounds[-1])

    words = "All bytes since the run began, both ways."
    if baseline:
        words += (
            " The dashed line is what the same rounds would have cost by plain federated averaging: the whole adapter "
            "in 32-bit numbers, down to every client asked and up from every one that answered."
        )
    if logarithmic:
        words += " Each step of the axis is ten times the one below."
    return draw("Bytes altogether", words, paint)


def time_line(run: Run) -> Plot | None:
    """Draws when each client of the last rounds worked, with a row for each client."""
    shown = [line for line in run.rounds if line.clients][-TIMED_ROUNDS:]
    if not shown:
        return None
    everyone = names(shown)
    named = len(everyone) <= NAMED_CLIENTS
    row_of = {name: row for row, name in enumerate(everyone)} if named else None
    rows = len(everyone) if named else min(max(len(line.clients) for line in shown), DRAWN_CLIENTS)
    first = f"rounds {shown[0].round} to {shown[-1].round}" if len(shown) > 1 else f"round {shown[0].round}"
    if shown[0].round > run.rounds[0].round:
        first += f" of {run.rounds[-1].round}"
    words = (
        f"When clients worked in {first}: a bar runs from the moment a client began to the moment its answer was "
        "there, a red cross is a client that the round lost. Rounds stand end to end, between upright lines; a round "
        "lasts until its slowest client."
    )
    if any(line.secure for line in shown):
        words += " Under secure aggregation a client's own time is hidden, and its bar begins with the round."
    if not named:
        words += " There are too many clients to name: in every round they are stacked in order of their answers"
        most = max(len(line.clients) for line in shown)
        words += f", and {rows} of up to {most:,} are drawn." if most > rows else "."
    row_inches = ROW_INCHES if named else ROW_INCHES / 3
    height = HEAD_INCHES + row_inches * max(rows, 6)
    return draw("Time line", words, lambda axes: _time_rows(axes, shown, row_of), height, wide=True)


def _score_bars(axes: Axes, scores: Sequence[tuple[float, str]], mean: float) -> None:
    from matplotlib.ticker import PercentFormatter

    rows = range(len(scores))
    axes.barh(rows, [score for score, _ in scores], color=GREEN, alpha=0.8, height=0.7)
    axes.axvline(mean, color=GREY, linestyle="--", linewidth=1.2)
    axes.set_yticks(rows, [clean_line(name, NAME_LENGTH) for _, name in scores])
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(scores) - 0.4)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _score_histogram(axes: Axes, scores: Sequence[float], mean: float) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.hist(scores, bins=20, range=(0, 1), color=GREEN, alpha=0.8, rwidth=0.9)
    axes.axvline(mean, color=GREY, linestyle="--", linewidth=1.2)
    axes.set_ylabel("clients")
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _loss_lines(axes: Axes, rounds: Sequence[Round], everyone: Sequence[str]) -> None:
    points = [(c.id, line.round, c.loss) for line in rounds for c in line.survivors if c.loss is not None]
    drawn, absurd = plausible(value for _, _, value in points)
    for name in everyone:
        own = [(number, value) for (id_, number, _), value in zip(points, drawn, strict=True) if id_ == name]
        if own:
            axes.plot(*zip(*own, strict=True), ".-", color=BLUE, alpha=0.35, linewidth=0.9, markersize=3)
    means, _ = plausible(line.train_loss for line in rounds)
    curve(axes, [line.round for line in rounds], means, ORANGE, "mean")
    note_absurd(axes, absurd)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("nats per token")
    round_axis(axes, rounds[0].round, rounds[-1].round)


def _loss_bands(axes: Axes, rounds: Sequence[Round]) -> None:
    flat, absurd = plausible(client.loss for line in rounds for client in line.survivors)
    values = iter(flat)
    spread = []  # one (10 %, 25 %, median, 75 %, 90 %) a round
    for line in rounds:
        ordered = sorted(v for v in itertools.islice(values, len(line.survivors)) if math.isfinite(v))
        shares = (0.1, 0.25, 0.5, 0.75, 0.9)
        spread.append([quantile(ordered, share) if ordered else math.nan for share in shares])
    low, lower, middle, upper, high = zip(*spread, strict=True)
    edges = [rounds[0].round - 0.5, *(line.round + 0.5 for line in rounds)]
    axes.stairs(high, edges, baseline=low, fill=True, color=BLUE, alpha=0.2, label="80 % of clients")
    axes.stairs(upper, edges, baseline=lower, fill=True, color=BLUE, alpha=0.35, label="50 %")
    curve(axes, [line.round for line in rounds], middle, ORANGE, "median")
    note_absurd(axes, absurd)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("nats per token")
    round_axis(axes, rounds[0].round, rounds[-1].round)


def _time_rows(axes: Axes, rounds: Sequence[Round], named: dict[str, int] | None) -> None:
    # Survivors, and dropouts that are known to have worked, as (row, from, to); crosses where a dropout ended.
    worked: list[tuple[float, float, float]] = []
    lost: list[tuple[float, float, float]] = []
    crosses: list[tuple[float, float]] = []
    begin, starts = 0.0, []
    label = "round {}" if len(rounds) <= LABELLED_ROUNDS else "{}"
    for line in rounds:
        starts.append(begin)
        for row, client in _in_rows(line, named):
            start, end = line.span(client)
            (worked if client.dropped is None else lost).append((row, begin + start, begin + end))
            if client.dropped is not None:
                crosses.append((begin + end, row))
        middle = begin + line.seconds / 2
        axes.text(middle, 1.0, label.format(line.round), transform=axes.get_xaxis_transform(), ha="center")
        begin += line.seconds
    thickness = 7.0 if named else 2.5
    for bars, colour in ((worked, BLUE), (lost, RED)):
        if bars:
            axes.hlines(*zip(*bars, strict=True), color=colour, linewidth=thickness, alpha=0.8)
    if crosses:
        given_up, rows = zip(*crosses, strict=True)
        axes.scatter(given_up, rows, marker="x", color=RED, s=18, linewidth=1.4, zorder=3)
    for start in starts[1:]:
        axes.axvline(start, color=GREY, linewidth=0.9)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0.0, max(begin, _SHORTEST_SECONDS))
    axes.set_xlabel("seconds")
    axes.invert_yaxis()
    if named:
        axes.set_yticks(list(named.values()), [clean_line(name, NAME_LENGTH) for name in named])
        axes.tick_params(axis="y", length=0, labelsize=9)
    else:
        axes.set_yticks([])
        axes.set_ylabel("clients")


def _in_rows(line: Round, named: dict[str, int] | None) -> list[tuple[int, Client]]:
    if named is not None:
        return [(named[client.id], client) for client in line.clients]
    ordered = sorted(line.clients, key=lambda client: client.answered if client.answered is not None else math.inf)
    stride = max(len(ordered) / DRAWN_CLIENTS, 1.0)
    drawn = [ordered[int(row * stride)] for row in range(min(len(ordered), DRAWN_CLIENTS))]
    return list(enumerate(drawn))


def _baseline_by_round(run: Run) -> list[float]:
    # The summary has one number for the whole run: each message of fp32 FedAvg, down or up, is as large as any other.
    if run.summary is None:
        return []
    messages = list(itertools.accumulate(len(line.clients) + len(line.survivors) for line in run.rounds))
    return [run.summary.fp32_fedavg_bytes * sent / messages[-1] for sent in messages] if messages[-1] else []


def _rounds_from_zero(axes: Axes, run: Run) -> None:
    first = 0 if run.evaluations and run.evaluations[0][0] == 0 else run.rounds[0].round
    round_axis(axes, first, run.rounds[-1].round)


def _mark_aborted(axes: Axes, rounds: Sequence[Round]) -> None:
    for line in rounds:
        if line.aborted is not None:
            axes.axvspan(line.round - 0.5, line.round + 0.5, color=RED, alpha=0.15, linewidth=0)


def _on_aborted(run: Run) -> str:
    return " Red strips are rounds that were aborted." if any(r.aborted is not None for r in run.rounds) else ""
