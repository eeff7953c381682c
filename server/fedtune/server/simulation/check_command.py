"""`fedtune check`: the command line around `job_check`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.server.run_display import format_seconds

if TYPE_CHECKING:
    from fedtune.data.lengths import Lengths
    from fedtune.server.simulation.job_check import Checked, Prediction

LISTED = 20  # bad lines that are printed; --json has all of them
CLIENTS_LISTED = 10
SHORT_SECONDS = 60.0  # below which a duration is shown with its tenths


def check(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Override one key of the job file; may be given again."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, and nothing else.")] = False,
) -> None:
    """Say whether a job can run, what is wrong with it and its data, and what it would take on this machine.

    Nothing is trained and nothing is written. The exit status is 0 if the job can run, and 1 if it cannot.

    Example: fedtune check job.toml --set data.sequence_length=512
    """
    from fedtune.server.simulation.job_check import check_job

    found = check_job(job, overrides or [])
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        for line in described(found, job):
            print(line)
    if found.problems:
        raise typer.Exit(1)


def described(found: Checked, job: Path) -> Iterator[str]:
    """Yields the lines that people read."""
    yield from listed(found.bad_lines, LISTED)
    yield from found.problems
    if found.clients:
        yield f"clients      {_clients(found.clients)}"
    if found.lengths and found.sequence_length:
        yield f"tokens       {_lengths(found.lengths)}"
        yield f"             {_fit(found.lengths, found.sequence_length)}"
    if found.scores_from:
        yield f"scores from  {found.scores_from}"
    if found.prediction:
        yield from _prediction(found.prediction)
    yield from found.warnings
    yield f"{job}: cannot run yet" if found.problems else f"{job}: can run; next: fedtune simulate {job}"


def listed(lines: Sequence[str], most: int) -> Iterator[str]:
    """Yields the first lines, and then the number of the others."""
    yield from lines[:most]
    if len(lines) > most:
        yield f"… and {len(lines) - most:,} more"


def _clients(counts: dict[str, int]) -> str:
    sizes = sorted(counts.values())
    spread = f"{sizes[0]:,} to {sizes[-1]:,} a client, median {sizes[len(sizes) // 2]:,}"
    names = ", ".join(listed([f"{name} {count:,}" for name, count in counts.items()], CLIENTS_LISTED))
    return f"{len(counts):,}, records {sum(sizes):,} ({spread}): {names}"


def _lengths(lengths: Lengths) -> str:
    part = f", of {lengths.measured:,} of the records" if lengths.measured < lengths.records else ""
    return f"median {lengths.median:,}, 95% up to {lengths.high:,}, the longest {lengths.longest:,}{part}"


def _fit(lengths: Lengths, sequence_length: int) -> str:
    """Returns what becomes of the records at the job's sequence length, and the length at which all would fit."""
    cleaned = lengths.cleaning
    cut = {
        "cut at the beginning of the prompt": cleaned.truncated,
        "dropped, since completion and prompt do not fit": cleaned.too_long,
        "more by cutting texts": cleaned.continued,
    }
    lost = {"dropped as equal to another": cleaned.duplicate, "dropped as empty": cleaned.empty}
    parts = [f"{count:,} {what}" for what, count in (cut | lost).items() if count] or ["every record fits"]
    longer = f"; {lengths.longest:,} would cut nothing" if any(cut.values()) else ""
    return f"at data.sequence_length = {sequence_length:,}: {', '.join(parts)}{longer}"


def _prediction(predicted: Prediction) -> Iterator[str]:
    from fedtune.client.plan.planner import megabytes

    plan, outcome = predicted.client.plan, predicted.client
    memory = f"{megabytes(plan.memory.peak)} beside {megabytes(outcome.runtime)} of program"
    yield f"one client   {memory}; {_seconds(outcome.training_seconds)} a round, in steps: {outcome.local_steps}"
    cohort = f"training of {predicted.clients}, {predicted.together} at a time: {_seconds(predicted.round_seconds)}"
    whole = _seconds(predicted.round_seconds * predicted.rounds)
    yield f"one round    {cohort}; of all rounds ({predicted.rounds}): {whole}"
    yield "             start, exchanges and evaluations come on top"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < SHORT_SECONDS else format_seconds(seconds)
