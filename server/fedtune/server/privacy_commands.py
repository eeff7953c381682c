"""`fedtune privacy`: plan the noise of a private job before anybody trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Differential privacy: what a guarantee costs.", no_args_is_help=True, suggest_commands=False)


@app.callback()
def _root() -> None:
    """Differential privacy: what a guarantee costs."""


@app.command()
def plan(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB.toml]", help="The job; by default the demo's.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key of the job; may be given again."),
    ] = None,
    clients: Annotated[
        int | None, typer.Option("--clients", metavar="N", min=1, help="Clients in all; by default data.clients.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, and nothing else.")] = False,
) -> None:
    """Show the noise of a job's rounds for several epsilons, and what would lower it.

    Reads the sizes of the base model and nothing else of it. Noise depends on all of the job: clients, participations,
    delta, the adapter's rank, secure_aggregation.max_dropout. So give it the whole job. Examples:

        fedtune privacy plan job.toml --clients 1000

        fedtune privacy plan benchmarks/privacy/demo.toml       # in a clone: the job whose cost README tells
    """
    from dataclasses import asdict

    from fedtune.core.text import counted
    from fedtune.data.job_inputs import job_or_demo
    from fedtune.server.privacy_plan import check_private, plan_privacy

    resolved = job_or_demo(job, overrides or [])
    check_private(resolved)
    from fedtune.model.shape import layout_of_sizes, shape_of

    layout = layout_of_sizes(shape_of(resolved.model).linear, resolved.adapter)
    made = plan_privacy(resolved, layout, clients or resolved.data.clients)
    if as_json:
        print(json.dumps(asdict(made), indent=2))
        return
    print(
        f"{made.values:,} trained values, {counted(made.clients, 'client')} a round, {counted(made.rounds, 'round')};"
    )
    print(f"each client takes part in {made.participations} of at most {resolved.privacy.participations}; ", end="")
    print(f"delta {made.delta:.2g}")
    print()
    print("epsilon   noise of a mean   bits (without)   exact match lost where as much was measured")
    for row in made.rows:
        mark = " <- the job's" if row.epsilon == resolved.privacy.epsilon else ""
        lost = ", ".join(f"{_points(*interval)} on {task}" for task, interval in row.losses.items())
        print(f"{row.epsilon:7g}   {row.share:9.2f} clips   {row.bits} ({row.plain_bits}){'':6}{lost}{mark}")
    for sentence in made.advice:
        print(f"\n{sentence}.")


def _points(least: float, most: float) -> str:
    both = dict.fromkeys((f"{least:.0f}", f"{most:.0f}"))
    return f"{' to '.join(both)} points"
