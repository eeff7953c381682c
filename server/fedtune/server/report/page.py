"""The pages that templates make: one run's report, or a comparison of several runs.

A page loads no resource and runs no script; the live page, which is another module's, runs its own. Its content
security policy makes the browser enforce that, in case a client's text should ever get past the escaping.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedtune.core.errors import InputError, MissingExtraError, RunError
from fedtune.core.metrics import EXACT, LOSS, METRICS, MetricName, custom_figure
from fedtune.core.round_records import Evaluation
from fedtune.core.text import counted
from fedtune.server.costs.cost_ledger import costs_json
from fedtune.server.costs.cost_statement import cost_sentences, cost_table
from fedtune.server.privacy_statement import guarantee
from fedtune.server.report.comparison import comparison_plots
from fedtune.server.report.cost_plots import cost_plots
from fedtune.server.report.plots import run_plots
from fedtune.server.report.reading import Run, clean, clean_line, read_run
from fedtune.server.run_directory import REPORT
from fedtune.server.run_display import format_bytes, format_seconds, what_the_server_saw
from fedtune.server.run_files import write_text

LISTED_DROPOUTS = 100
LISTED_REASONS = 6
LISTED_NOTES = 20
REASON_LENGTH = 200
LABEL_LENGTH = 28
ABSENT = "–"


@dataclass(frozen=True)
class Fact:
    """A headline number: its label, its value, and a short note."""

    label: str
    value: str
    note: str = ""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes a run's report, whether the run is finished or not.

    Args:
        out: the file to write; None for report.html in the run directory.

    Returns:
        The report's path.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        RunDirectoryError: the path is not a run directory, or a file in it is not one that a run writes.
        RunError: the report cannot be written.
    """
    _require_packages()
    data = read_run(run)
    reasons = Counter(clean_line(reason, REASON_LENGTH) for _, _, reason in data.dropouts)
    notes = Counter(clean_line(note, REASON_LENGTH) for _, note in data.notes)
    costs = costs_json(data.ledger, data.prices)
    return _write(
        out or run / REPORT,
        "report.html.j2",
        title=data.name,
        run=data,
        planned=data.settings.get("federation.rounds"),
        facts=headline(data),
        metric=METRICS[data.metric] if METRICS[data.metric].generated else None,
        custom=list(dict.fromkeys(name for _, score in data.evaluations for name in score.custom)),
        saw=what_the_server_saw(data.summary.secure_aggregation) if data.summary else None,
        guarantee=guarantee(data.summary.privacy) if data.summary and data.summary.privacy else None,
        plots=run_plots(data),
        costs=cost_table(costs) if data.ledger.total.flops else None,
        cost_sentences=list(cost_sentences(costs, data.metric)),
        cost_plots=cost_plots(data),
        notes=notes.most_common(LISTED_NOTES),
        aborted=[line for line in data.rounds if line.aborted is not None],
        asked=sum(len(line.clients) for line in data.rounds),
        dropped=reasons.total(),
        reasons=reasons.most_common(LISTED_REASONS),
        dropouts=list(data.dropouts)[-LISTED_DROPOUTS:],
    )


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Writes a page that compares several runs: numbers, lines, and the settings in which they differ.

    Args:
        runs: two run directories or more.
        out: the file to write; an older one is replaced.

    Returns:
        `out`.

    Raises:
        The errors of `write_report`; and InputError for fewer than two runs.
    """
    _require_packages()
    if len(runs) < 2:
        raise InputError(f"a comparison needs two run directories or more; got {len(runs)}")
    data = [read_run(path) for path in runs]
    # The number distinguishes runs of the same name.
    labels = [f"{place} {clean_line(run.name, LABEL_LENGTH)}" for place, run in enumerate(data, 1)]
    facts = [{fact.label: fact for fact in headline(run)} for run in data]
    return _write(
        out,
        "comparison.html.j2",
        title=f"{len(data)} runs",
        labels=labels,
        facts=facts,
        rows=list(dict.fromkeys(label for run in facts for label in run)),
        plots=comparison_plots(data, labels),
        differences=_differences(data),
    )


def headline(run: Run) -> list[Fact]:
    """Returns the run's most important numbers."""
    aborted = sum(line.aborted is not None for line in run.rounds)
    facts = [
        *_quality(run),
        _bytes(run),
        Fact("Time", format_seconds(run.seconds), f"{counted(len(run.rounds), 'round')}, {aborted} aborted"),
    ]
    if run.summary is not None:
        summary = run.summary
        facts += [
            Fact("Peak memory", f"{summary.peak_rss_mb:,.0f} MB", "all processes on the server's side"),
            Fact("Adapter", f"{summary.adapter_parameters:,}", "parameters trained; the base model is frozen"),
            Fact("Clients", f"{summary.clients:,}", _lost(run)),
        ]
    return facts


def _quality(run: Run) -> list[Fact]:
    before = run.summary.eval_before if run.summary else None
    last = run.evaluations[-1] if run.evaluations else None
    facts = []
    if last is not None:
        number, after = last
        note = f"{'before → ' if before else ''}after {counted(number, 'round')}; {counted(after.examples, 'example')}"
        for place, metric in enumerate(dict.fromkeys((after.metric, EXACT, LOSS))):
            facts.append(Fact(METRICS[metric].title, _change(before, after, metric), "" if place else note))
        for name, value in after.custom.items():
            values = [*([before.custom[name]] if before and name in before.custom else []), value]
            facts.append(Fact(name, " → ".join(map(custom_figure, values)), "mean over answers"))
    elif trained := [line for line in run.rounds if line.train_loss is not None]:
        first, end = trained[0], trained[-1]
        note = f"training, round {first.round} → {end.round}; the server holds no examples out"
        facts.append(Fact("Loss", f"{first.train_loss:.4g} → {end.train_loss:.4g}", note))
    if (line := run.held_out) is not None and (score := line.held_out) is not None:
        scored = sum(part.eval is not None for part in line.client_evaluations)
        note = f"exact match over {counted(scored, 'client')}, round {line.round}"
        facts.append(Fact("On clients' held-out data", f"{score.exact_match:.1%}", note))
    return facts


def _change(before: Evaluation | None, after: Evaluation, metric: MetricName) -> str:
    scores = [before, after] if before and before is not after else [after]
    values = [score.value(metric) for score in scores]
    return " → ".join(METRICS[metric].shown(value) for value in values if value is not None)


def _bytes(run: Run) -> Fact:
    moved = run.moved
    if run.summary is None or not moved:
        return Fact("Bytes moved", format_bytes(moved), "both ways, all clients")
    baseline = run.summary.fp32_fedavg_bytes
    note = f"fp32 FedAvg: {format_bytes(baseline)}, {baseline / moved:.2g} times as much"
    return Fact("Bytes moved", format_bytes(moved), note)


def _lost(run: Run) -> str:
    asked, lost = sum(len(line.clients) for line in run.rounds), sum(1 for _ in run.dropouts)
    return f"asked {counted(asked, 'time')} in all; {lost:,} dropped out"


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [(key, [str(run.settings.get(key, ABSENT)) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def render(template: str, **values: Any) -> str:
    """Returns the page that a template makes of values; all text in it is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"prose": clean, "line": clean_line, "bytes": format_bytes}
    return environment.get_template(template).render(absent=ABSENT, **values)


def _write(path: Path, template: str, **values: Any) -> Path:
    try:
        write_text(path, render(template, **values))
    except OSError as error:
        raise RunError(f"{path}: the report cannot be written: {error.strerror}") from error
    return path


def _require_packages() -> None:
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            raise MissingExtraError("fedtune report", "server", package)
