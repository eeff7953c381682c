"""A run from its first evaluation to its summary, on any Flower grid: in a simulation or live.

This module has the steps between rounds: evaluation, acknowledgement on disk, the display. `fedtune.strategies`
defines the round itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from fedtune.core.adapter.layout import AdapterLayout, Vector, adapter_digest
from fedtune.core.errors import RunDirectoryError, RunError
from fedtune.core.host.process import versions
from fedtune.core.job.cost_settings import BudgetSettings
from fedtune.core.job.settings import LORA_RANK, Job
from fedtune.core.ledger import Ledger
from fedtune.core.round_records import ClientEvaluation, ClientRecord, Evaluation
from fedtune.core.spans import span
from fedtune.core.text import counted
from fedtune.flower.stock_apps import Grid
from fedtune.flower.strategy import AdapterStrategy
from fedtune.model.flops import ExampleLengths, Flops
from fedtune.model.shape import shape_of
from fedtune.server.costs.budget import exhausted
from fedtune.server.costs.cost_ledger import CostLedger, costs_json
from fedtune.server.costs.power import meter_of
from fedtune.server.costs.work_counter import WorkCounter
from fedtune.server.privacy_plan import plan_privacy
from fedtune.server.privacy_statement import privacy_summary
from fedtune.server.round_reports import RoundReports
from fedtune.server.run_directory import (
    CANCELLED,
    FAILED,
    FINISHED,
    JOB,
    REPORT,
    ROUNDS,
    Checkpoint,
    RunDirectory,
    file_digests,
)
from fedtune.server.run_display import Display, describe
from fedtune.server.tracking.run_trackers import RunTrackers
from fedtune.strategies.cohorts.selection import cohort_size
from fedtune.strategies.evaluation_round import pooled, scored_sets
from fedtune.strategies.federation import Federation, initial_state

SHOWN_PROMPTS = 3
EVALUATING, ANSWERING = "evaluating", "answering the sample prompts"  # names of work that the display shows

Progress = Callable[[int, int], None]
"""Takes the number of pieces that are done, and the number of all: first 0 of them, at last all."""


@dataclass(frozen=True)
class Facts:
    """The facts in a summary beside the rounds.

    Args:
        peak_rss_mb: peak memory of all processes of the run, in MB.
        records: counts of the clients' records, if this machine knows them: read, kept, truncated and so on.
        seeded_noise: whether the noise of differential privacy follows from the job's seed.
    """

    peak_rss_mb: float
    records: Mapping[str, int]
    seeded_noise: bool = False


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt answered before and after training, for people to look at.

    Args:
        prompt: the prompt for people: of a conversation, its last message.
        input: the prompt for the model, a conversation as the chat template writes it.
    """

    prompt: str
    input: str
    expected: str


@dataclass(frozen=True)
class _Ending:
    """The evaluator's answers and score at a run's end.

    Args:
        answers: the answer to each prompt.
        score: the score, where the last round has none since a budget ended the run.
    """

    prompts: Sequence[ShownPrompt]
    answers: Sequence[str]
    score: Evaluation | None = None


class Evaluator(Protocol):
    """The interface of evaluators: the server's own examples, and the model to score an adapter on them."""

    @property
    def shown(self) -> Sequence[ShownPrompt]:
        """Returns the prompts to show; none if the job has no evaluation data."""

    @property
    def lengths(self) -> ExampleLengths | None:
        """Returns the mean length of the examples; None if the job has no evaluation data."""

    def evaluate(self, adapter: Vector, progress: Progress) -> Evaluation | None:
        """Scores an adapter; returns None if the job has no evaluation data."""

    def answer(self, adapter: Vector, progress: Progress) -> list[str]:
        """Returns an adapter's answers to the shown prompts."""


def run_rounds(
    strategy: AdapterStrategy,
    directory: RunDirectory,
    grid: Grid,
    evaluator: Evaluator,
    display: Display,
    facts: Callable[[], Facts],
) -> dict[str, Any]:
    """Runs or resumes a job until its last round, or until a budget is spent, and writes the run directory's files.

    Args:
        facts: called at the end.

    Returns:
        The summary, as in summary.json.

    Raises:
        RunError: no round changed the adapter; all files are written nevertheless.
    """
    federation = strategy.federation
    job = federation.job
    started = time.monotonic()
    population = len(strategy.roster(grid))

    def evaluate(number: int, adapter: Vector) -> Evaluation | None:
        every = job.federation.evaluate_every
        due = number == job.federation.rounds or (every > 0 and number % every == 0)
        return evaluator.evaluate(adapter, shown_as(display, EVALUATING)) if due else None

    def stop() -> bool:
        return _ended_by_budget(job, directory.rounds) is not None

    with meter_of(job) as meter:
        counter = WorkCounter(job, Flops.of(shape_of(job.model), job.adapter), evaluator.lengths, meter)
        checkpoint = _opened(strategy, directory, evaluator, display, population)
        if not checkpoint.state.round and checkpoint.eval_before is not None:
            counter.scored(checkpoint.eval_before)
        spent_before = checkpoint.seconds
        with RunTrackers(directory.path, job.tracking.to, display.note) as trackers:
            with RoundReports(directory.path) as reports:
                for state, record in strategy.rounds(grid, checkpoint.state, job.federation.rounds, evaluate, stop):
                    seconds = spent_before + time.monotonic() - started
                    checkpoint = replace(checkpoint, state=state, seconds=seconds)
                    with span("record and checkpoint"):
                        directory.acknowledge(checkpoint, counter.counted(record))
                    reports.after_round()
                    trackers.after_round()
            if checkpoint.state.round < job.federation.rounds:
                display.note(f"the run ends here: {_ended_by_budget(job, directory.rounds)}")
            ending = _ending(checkpoint, evaluator, display, scored=bool(directory.rounds()[-1]["eval"]))
            summary = _finish(federation, directory, ending, checkpoint, population, facts())
            display.end(summary)
    if summary["status"] == FAILED:
        raise RunError(f"{directory.path}: {_why_nothing_came(directory.rounds())}")
    return summary


def close_run(
    federation: Federation, directory: RunDirectory, evaluator: Evaluator, display: Display, facts: Facts
) -> None:
    """Writes adapter, summary and report of a run that ends before its last round; one without rounds has none."""
    checkpoint = directory.restore()
    if checkpoint is None or not checkpoint.state.round:
        return
    population = len({client for line in directory.rounds() for client in line["cohort"]})
    ending = _ending(checkpoint, evaluator, display, scored=True)  # whoever cancels a run does not wait for its score
    with RunTrackers(directory.path, federation.job.tracking.to, display.note):
        display.end(_finish(federation, directory, ending, checkpoint, population, facts))


def shown_as(display: Display, task: str) -> Progress:
    """Returns a progress that the display shows under a name."""
    return lambda done, count: display.progress(task, done, count)


def _opened(
    strategy: AdapterStrategy, directory: RunDirectory, evaluator: Evaluator, display: Display, population: int
) -> Checkpoint:
    """Returns the checkpoint from which the run goes on, and shows where it stands.

    Raises:
        RunDirectoryError: the run began on another base model or on other terms.
    """
    federation = strategy.federation
    job = federation.job
    if job.privacy.mode != "off":
        for advice in plan_privacy(job, federation.layout, population).advice:
            display.note(f"privacy  {advice}")
    checkpoint = directory.restore() or _begin(directory, federation, evaluator, display)
    if checkpoint.base_digest != federation.base.digest:
        raise RunDirectoryError(
            f"{directory.path}: the run began on another base model (digest {checkpoint.base_digest[:16]}…, "
            f"now {federation.base.digest[:16]}…)"
        )
    if checkpoint.terms_digest != federation.terms.digest:
        raise RunDirectoryError(
            f"{directory.path}: the run began on other terms than its {JOB} has now, or with an earlier release, whose "
            "clients drew other random numbers; begin a new run"
        )
    rounds = directory.rounds()
    for line in rounds:
        strategy.remember(line["round"], [ClientRecord.from_json(client) for client in line["clients"]])
    display.note(f"scores from: {scored_sets(job)}")
    if checkpoint.eval_before is not None:
        display.note(f"before training: {describe(checkpoint.eval_before)}")
    moved = sum(sum(line["bytes"][way] for way in ("up", "down")) for line in rounds)
    cohort = cohort_size(job.federation.clients_per_round, population)
    display.begin(checkpoint.state.round, job.federation.rounds, cohort, moved)
    return checkpoint


def _ended_by_budget(job: Job, rounds: Callable[[], Sequence[dict[str, Any]]]) -> str | None:
    """Returns the reason why the run ends before its next round; None where it has no budget, or some left."""
    return exhausted(CostLedger.read(rounds()), job) if job.budget != BudgetSettings() else None


def _ending(checkpoint: Checkpoint, evaluator: Evaluator, display: Display, scored: bool) -> _Ending:
    adapter = checkpoint.state.adapter
    score = None if scored else evaluator.evaluate(adapter, shown_as(display, EVALUATING))
    return _Ending(evaluator.shown, evaluator.answer(adapter, shown_as(display, ANSWERING)), score)


def _begin(directory: RunDirectory, federation: Federation, evaluator: Evaluator, display: Display) -> Checkpoint:
    state = initial_state(federation)
    checkpoint = Checkpoint(
        state,
        federation.base.digest,
        federation.terms.digest,
        0.0,
        evaluator.evaluate(state.adapter, shown_as(display, EVALUATING)),
        tuple(evaluator.answer(state.adapter, shown_as(display, ANSWERING))),
    )
    with span("record and checkpoint"):
        directory.acknowledge(checkpoint, None)
    return checkpoint


def _finish(
    federation: Federation,
    directory: RunDirectory,
    ending: _Ending,
    checkpoint: Checkpoint,
    population: int,
    facts: Facts,
) -> dict[str, Any]:
    adapter_path = directory.save_adapter(federation.layout, checkpoint.state, federation.base.name)
    rounds = directory.rounds()
    last = rounds[-1]
    up, down = (sum(line["bytes"][direction] for line in rounds) for direction in ("up", "down"))
    whole = checkpoint.state.round == federation.job.federation.rounds
    ended = None if whole else _ended_by_budget(federation.job, lambda: rounds)
    rank = reference_rank(federation.layout)
    baseline = fp32_fedavg_bytes(lora_size(federation.layout, rank), rounds)
    summary: dict[str, Any] = {
        "status": FAILED if all(line["aborted"] for line in rounds) else FINISHED if whole or ended else CANCELLED,
        "ended": ended,
        "rounds": checkpoint.state.round,
        "clients": population,
        "eval_before": checkpoint.eval_before.to_json() if checkpoint.eval_before else None,
        "eval_after": ending.score.to_json() if ending.score else last["eval"],
        "scores_from": scored_sets(federation.job),
        "client_evaluation": _pooled_json(last["client_evaluations"]),
        "bytes": {"up": up, "down": down, "total": up + down},
        "traffic": sum((Ledger.from_json(line["traffic"]) for line in rounds), Ledger()).to_json(),
        "secure_aggregation": secure_summary(federation.job, rounds),
        "costs": costs_json(CostLedger.read(rounds), federation.job.cost),
        "privacy": privacy_summary(federation.job, rounds, facts.seeded_noise),
        "tiers": tier_summary(rounds),
        "fp32_fedavg_bytes": baseline,
        "fp32_fedavg_rank": rank,
        "traffic_ratio": baseline / (up + down) if up + down else 0.0,
        "adapter_parameters": federation.layout.size,
        "learning_rate": federation.job.training.first_learning_rate,
        "seconds": round(checkpoint.seconds, 3),
        "peak_rss_mb": round(max(facts.peak_rss_mb, directory.earlier_peak_mb()), 1),
        "records": dict(facts.records),
        "versions": versions(),
        "base_digest": federation.base.digest,
        "adapter_digest": adapter_digest(checkpoint.state.adapter),
        "files": file_digests(directory.path, [*sorted(adapter_path.iterdir()), directory.path / ROUNDS]),
        "answers": [
            {**asdict(prompt), "before": before, "after": after}
            for prompt, before, after in zip(ending.prompts, checkpoint.answers_before, ending.answers, strict=True)
        ],
        "paths": {
            "adapter": str(adapter_path),
            "rounds": str(directory.path / "rounds.jsonl"),
            "report": str(directory.path / REPORT),
        },
    }
    directory.write_summary(summary)
    with span("report"):
        from fedtune.server.report import write_report  # importing plotting libraries takes a second

        write_report(directory.path)
    return summary


def _why_nothing_came(rounds: Sequence[dict[str, Any]]) -> str:
    reasons = Counter(client["dropped"] for line in rounds for client in line["clients"] if client["dropped"])
    often = "".join(
        f"; {counted(count, 'time')} a client dropped out: {reason}" for reason, count in reasons.most_common(1)
    )
    last = rounds[-1]["aborted"]
    return (
        f"none of {counted(len(rounds), 'round')} gave an aggregate, the adapter is unchanged. The last: {last}{often}"
    )


def reference_rank(layout: AdapterLayout) -> int:
    """Returns the rank of the LoRA adapter that a run is compared with: its own, or the default for a core adapter."""
    return layout.rank if layout.kind == "lora" else LORA_RANK


def lora_size(layout: AdapterLayout, rank: int) -> int:
    """Returns the number of values of A and B of this rank on the layout's modules."""
    return rank * sum(module.d_in + module.d_out for module in layout.modules)


def fp32_fedavg_bytes(values: int, rounds: Sequence[dict[str, Any]]) -> int:
    """Returns the bytes that the same run would have moved as fp32 FedAvg: 4 bytes a value down to every client of the
    cohort and up from every survivor."""
    messages = sum(len(line["cohort"]) + len(line["survivors"]) for line in rounds)
    return 4 * values * messages


def secure_summary(job: Job, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes a run's secure aggregation: the clients in its sums, and how many could have opened one."""
    settings = job.secure_aggregation
    sums = [line["secure"] for line in rounds if line["secure"]]
    return {
        "enabled": settings.enabled,
        "max_dropout": settings.max_dropout,
        "max_corrupt": settings.max_corrupt,
        "sums": sum(each.get("groups", 1) for each in sums),
        "groups": max((each.get("groups", 1) for each in sums), default=0),
        "summed_least": min((each.get("smallest", each["summed"]) for each in sums), default=0),
        "minimum": min((each["minimum"] for each in sums), default=0),
        "threshold": min((each["threshold"] for each in sums), default=0),
        "evaluations_shown": any(part["eval"] for line in rounds for part in line["client_evaluations"]),
    }


def tier_summary(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts for each tier, largest first, how often its clients were asked, trained less, sat out, and contributed."""
    times = [(client, line["aborted"] is None) for line in rounds for client in line["clients"]]
    counted = sum(whole and client["dropped"] is None for client, whole in times)
    tiers = []
    for tier in sorted({client["tier"] for client, _ in times}, reverse=True):
        own = [(client, whole) for client, whole in times if client["tier"] == tier]
        updates = sum(whole and client["dropped"] is None for client, whole in own)
        tiers.append(
            {
                "tier": tier,
                "asked": len(own),
                "merged": sum(0 < client["rank"] < tier for client, _ in own),
                "sat_out": sum(client["rank"] == 0 for client, _ in own),
                "updates": updates,
                "share": updates / counted if counted else 0.0,
            }
        )
    return tiers


def _pooled_json(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    evaluations = [ClientEvaluation(part["id"], Evaluation.from_json(part["eval"])) for part in parts if part["eval"]]
    score = pooled(evaluations)
    return score.to_json() if score else None
