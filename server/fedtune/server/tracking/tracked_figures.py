"""The settings and figures that experiment trackers get, under standard names: all from the files of the run.

Names of figures by round: eval/*, client_eval/*, train/*, round/*, cost/*; of the whole run: summary/*. Nothing is
about a single client, and a figure that was not measured is left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fedtune.core.job.settings import Job
from fedtune.core.round_records import ClientEvaluation, Evaluation
from fedtune.strategies.evaluation_round import pooled

Setting = str | int | float | bool


def tracked_settings(job: Job) -> dict[str, Setting]:
    """Returns the job's settings, "section.key" -> value; lists as JSON, keys without a value left out."""
    return {
        f"{section}.{key}": json.dumps(value) if isinstance(value, tuple) else value
        for section, values in dataclasses.asdict(job).items()
        for key, value in values.items()
        if value is not None
    }


def evaluation_figures(score: Mapping[str, Any] | None, group: str = "eval") -> dict[str, float]:
    """Returns the figures of an evaluation as records have it; none without one."""
    if score is None:
        return {}
    figures = {"loss": score["loss"], "exact_match": score["exact_match"]}
    if score["score"] is not None:  # of generated answers
        figures[score["metric"]] = score["score"]
    figures |= score.get("custom", {})  # earlier releases had none
    return _measured({f"{group}/{name}": value for name, value in figures.items()})


def round_figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of a line of rounds.jsonl."""
    parts = [ClientEvaluation(part["id"], _evaluation(part["eval"])) for part in line["client_evaluations"]]
    held_out = pooled(parts)
    figures = {
        "train/loss": line["train_loss"],
        "train/learning_rate": line["learning_rate"],
        "round/seconds": line["seconds"],
        "round/clients": len(line["cohort"]),
        "round/survivors": len(line["survivors"]),
        "round/aborted": line["aborted"] is not None,
        "round/bytes_up": line["bytes"]["up"],
        "round/bytes_down": line["bytes"]["down"],
        "round/bytes_secagg": line["bytes"]["secagg"],
    }
    work = line.get("work", ())  # earlier releases had none
    if work:
        figures["cost/flops"] = sum(part["flops"] for part in work)
        figures["cost/joules"] = sum(part["joules"] for part in work) if line["energy"] else None
    clients = evaluation_figures(held_out.to_json() if held_out else None, "client_eval")
    return evaluation_figures(line["eval"]) | clients | _measured(figures)


def summary_figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of summary.json."""
    before = evaluation_figures(summary["eval_before"], "summary/before")
    after = evaluation_figures(summary["eval_after"], "summary/after")
    clients = evaluation_figures(summary["client_evaluation"], "summary/clients")
    privacy = summary.get("privacy") or {}  # earlier releases had none
    figures = {
        "summary/rounds": summary["rounds"],
        "summary/clients_in_all": summary["clients"],
        "summary/bytes_up": summary["bytes"]["up"],
        "summary/bytes_down": summary["bytes"]["down"],
        "summary/traffic_ratio": summary["traffic_ratio"],
        "summary/adapter_parameters": summary["adapter_parameters"],
        "summary/seconds": summary["seconds"],
        "summary/peak_rss_mb": summary["peak_rss_mb"],
        "summary/epsilon": privacy.get("epsilon"),
    }
    return before | after | clients | _measured(figures)


def _evaluation(values: Mapping[str, Any] | None) -> Evaluation | None:
    return Evaluation.from_json(values) if values else None


def _measured(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if value is not None}
