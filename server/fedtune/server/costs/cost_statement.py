"""The costs of a run for people: a table by purpose, and sentences about what a point of quality took.

The terminal and the report show the same, from the costs of a summary (`fedtune.server.costs.cost_ledger.costs_json`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fedtune.core.metrics import METRICS, MetricName

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class CostTable:
    """A table: its columns, and rows whose first cell is a name."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def cost_table(costs: Mapping[str, Any]) -> CostTable:
    """Returns the costs by purpose, of each tier where there are several, and in all; without what nothing tells."""
    total = costs["total"]
    cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "operations": lambda cost: amount(cost["flops"], "FLOP"),
        "tokens": lambda cost: f"{cost['tokens']:,}",
        "time": lambda cost: f"{cost['seconds']:,.1f} s",
        "up": lambda cost: amount(cost["up"], "B"),
        "down": lambda cost: amount(cost["down"], "B"),
    }
    if total["joules"] is not None and costs["energy"]:
        cells[f"energy ({costs['energy']})"] = lambda cost: amount(cost["joules"] or 0.0, "J")
    if total["money"] is not None:
        cells["money"] = lambda cost: money_text(cost["money"], costs["currency"])
    named = list(costs["purposes"].items())
    tiers = [(f"tier {part['tier']}", part) for part in costs["tiers"] if part["tier"] is not None]
    named += [*(tiers if len(tiers) > 1 else []), ("in all", total)]
    rows = tuple((name, *(cell(cost) for cell in cells.values())) for name, cost in named)
    return CostTable(("for", *cells), rows)


def cost_sentences(costs: Mapping[str, Any], metric: MetricName) -> Iterator[str]:
    """Yields what a point of quality took, what a target took, and what share of the money is for compute."""
    told = METRICS[metric]
    if costs["points_per_gflop"]:
        yield f"{costs['points_per_gflop']:.3g} points of {told.label} for each GFLOP."
    if reached := costs["target"]:
        spent = [amount(reached["flops"], "FLOP"), f"{amount(reached['up'] + reached['down'], 'B')} moved"]
        if reached["joules"] is not None:
            spent.append(f"{amount(reached['joules'], 'J')} ({costs['energy']})")
        if reached["money"] is not None:
            spent.append(money_text(reached["money"], costs["currency"]))
        shown = f"{told.title} of {told.shown(reached['value'])} was reached in round {reached['round']}"
        yield f"{shown}, after {', '.join(spent)} and {reached['seconds']:,.0f} s."
    if costs["compute_share"] is not None:
        share = f"{costs['compute_share']:.0%}"
        yield f"{share} of the money is for compute, which is energy and hours of machines; the rest is traffic."


def rich_cost_table(costs: Mapping[str, Any]) -> Table:
    """Returns the table for a terminal."""
    content = cost_table(costs)
    table = Table(title="what it cost", title_justify="left")
    for index, column in enumerate(content.columns):
        table.add_column(column, justify="right" if index else "left")
    for index, row in enumerate(content.rows):
        table.add_row(*row, end_section=index == len(content.rows) - 2)
    return table


def amount(value: float, unit: str) -> str:
    """Formats an amount by powers of a thousand: (1234567, "J") -> "1.23 MJ"."""
    for prefix in _PREFIXES:
        if value < 999.5 or prefix == _PREFIXES[-1]:
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}" if prefix else f"{value:.0f} {unit}"


def money_text(value: float, currency: str) -> str:
    """Formats an amount of money, which may be far below the smallest coin: 0.0001234 -> "0.000123 EUR"."""
    return f"{value:,.2f} {currency}" if value >= 1 else f"{value:.3g} {currency}"
