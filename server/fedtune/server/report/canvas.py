"""Drawing for a page: one pair of axes as inline SVG, readable on light and dark background, on paper and on a phone.

    plot = draw("Loss", "What it shows, in plain words.", lambda axes: axes.plot(rounds, losses))

The background is transparent, lines are mid-tones, and text stays text, which the page's style sheet colours. The same
values give the same bytes: no date, no random identifiers, none of the user's own matplotlib settings.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtune.core.text import counted
from fedtune.server.run_display import format_bytes

if TYPE_CHECKING:  # importing matplotlib takes a second, so only commands that draw import it
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, GREY = "#3b82f6", "#e8760c", "#17a34a", "#e5484d", "#8a8f98"
LINES = (BLUE, ORANGE, GREEN, "#a855f7", "#0e9aa7", RED, "#b7791f", GREY)  # the lines of a comparison, one colour a run

WIDTH = 5.2  # inches; narrow, so that ten-point text is still readable on a phone
HEIGHT = 3.0
WIDE = 10.0  # for a plot that spans the page; on a phone it scrolls sideways
LEGEND_CHARACTERS = 66  # as many as fit the width
LEGEND_SIGN = 6  # width of a sign and the space around it, in characters
ABSURD = 100.0  # a loss over this many times the median and this many nats is an error or a lie
LARGEST = 1e30  # nats; axes cannot be laid out near the end of the floating-point range
MARKED_POINTS = 40  # more dots than that hide their line

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a client's name is not a formula
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Plot:
    """A picture for a page.

    Args:
        title: two or three words.
        words: a description of the picture for readers who cannot read plots.
        svg: one <svg> element, safe to put into HTML as it is.
        wide: whether the picture takes the page's whole width.
    """

    title: str
    words: str
    svg: str
    wide: bool = False


def draw(title: str, words: str, paint: Callable[[Axes], None], height: float = HEIGHT, wide: bool = False) -> Plot:
    """Draws a plot.

    Args:
        paint: draws the data on the axes.
        height: height in inches.
        wide: whether the plot is twice as wide as others.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    salt = {"svg.hashsalt": title}  # identifiers must not repeat between the pictures of a page
    with style.context(["default", {**_STYLE, **salt}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser's fonts will have it
        figure = Figure(figsize=(WIDE if wide else WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        if labels := axes.get_legend_handles_labels()[1]:
            columns = max(1, LEGEND_CHARACTERS // (max(map(len, labels)) + LEGEND_SIGN))
            figure.legend(loc="outside upper left", ncols=columns, columnspacing=1.2, handlelength=1.4)
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    return Plot(title, words, svg[svg.index("<svg") :], wide)


def round_axis(axes: Axes, first: int, last: int) -> None:
    """Labels the x-axis with whole rounds."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def share_axis(axes: Axes) -> None:
    """Scales the y-axis from 0 % to 100 %."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def byte_axis(axes: Axes) -> None:
    """Labels the y-axis with bytes in readable units."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: format_bytes(count).replace(".0 ", " ")))
    axes.yaxis.set_minor_formatter(NullFormatter())


def curve(
    axes: Axes, rounds: Sequence[float], values: Sequence[float], colour: str, label: str, dash: str = "-"
) -> None:
    """Draws a line through the values, with a dot at each value while there are few."""
    axes.plot(rounds, values, dash, marker="." if len(rounds) <= MARKED_POINTS else "", color=colour, label=label)


def plausible(losses: Iterable[float | None]) -> tuple[list[float], int]:
    """Returns the losses to draw, with NaN for absent and absurd ones, and the number of absurd ones.

    The values that clients report are not bounded: a single client must not be able to flatten or break a plot.
    """
    numbers = [math.nan if loss is None else float(loss) for loss in losses]
    sizes = sorted(abs(number) for number in numbers if math.isfinite(number))
    most = ABSURD * min(max(sizes[len(sizes) // 2], 1.0), LARGEST) if sizes else 0.0
    kept = [number if abs(number) <= most else math.nan for number in numbers]
    absurd = sum(math.isnan(k) and not math.isnan(n) for k, n in zip(kept, numbers, strict=True))
    return kept, absurd


def note_absurd(axes: Axes, count: int) -> None:
    """Notes in the plot how many values are missing from it."""
    if count:
        text = f"{counted(count, 'value')} far off the scale not drawn"
        axes.text(0.99, 0.97, text, transform=axes.transAxes, ha="right", va="top", fontsize=8)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Returns the quantile of the ordered values, with linear interpolation between neighbours."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
