"""The `fedtune` command. Each command imports the modules it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedtune.client import client_commands
from fedtune.client.inference.inference_commands import chat, serve
from fedtune.core.errors import FedtuneError, MissingExtraError
from fedtune.core.host.process import prepare_environment
from fedtune.server import edge_commands, privacy_commands, server_commands
from fedtune.server.export.export_command import export
from fedtune.server.fleet import fleet_commands
from fedtune.server.init_command import init
from fedtune.server.run_display import Display, Several, Silent, Terminal, error_console, shown
from fedtune.server.simulation.check_command import check
from fedtune.server.tracking.track_command import track

if TYPE_CHECKING:
    from fedtune.core.job.settings import Job
    from fedtune.server.export.exporter import Exported
    from fedtune.server.export.request import ExportRequest

app = typer.Typer(
    name="fedtune",
    help="Federated QLoRA fine-tuning of language models, from cloud to edge.",
    no_args_is_help=True,
    suggest_commands=False,  # click suggests them already
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(fleet_commands.app, name="fleet")
app.add_typer(server_commands.app, name="server")
app.add_typer(client_commands.app, name="client")
app.add_typer(privacy_commands.app, name="privacy")
app.add_typer(edge_commands.app, name="edge")

_Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override one key of the job file; may be given again. A path starts at the job file's folder, or without "
        "one at the working directory.",
    ),
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
_Page = Annotated[
    bool, typer.Option("--page", help="Serve a live page of the run to browsers on this machine; prints its address.")
]
_Profile = Annotated[
    bool,
    typer.Option(
        "--profile", help="Measure where the time goes: a table at the end, and trace.json for ui.perfetto.dev."
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON at the end, and nothing else.")]


def _simulate(job: Job, path: Path, display: Display, force: bool, profile: bool) -> dict[str, Any]:
    from fedtune.server.simulation.simulate import simulate as run

    return run(job, path, display, force=force, profile=profile)


def _resume(path: Path, display: Display, profile: bool) -> dict[str, Any]:
    from fedtune.server.simulation.simulate import resume as run

    return run(path, display, profile=profile)


def _export(request: ExportRequest, display: Display) -> list[Exported]:
    from fedtune.server.export.request import export as run

    return run(request, display)


@dataclass(frozen=True)
class Programs:
    """The functions that the long-running commands call with their options; tests pass others to `main`."""

    simulate: Callable[[Job, Path, Display, bool, bool], dict[str, Any]] = _simulate
    resume: Callable[[Path, Display, bool], dict[str, Any]] = _resume
    export: Callable[[ExportRequest, Display], list[Exported]] = _export


@app.command()
def simulate(
    context: typer.Context,
    job: Annotated[
        Path | None, typer.Argument(metavar="[JOB.toml]", help="The job file; without one, the bundled demo.")
    ] = None,
    overrides: _Set = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run directory; by default runs/JOB-NUMBER.")
    ] = None,
    fleet: Annotated[
        Path | None,
        typer.Option(
            "--fleet",
            metavar="FILE",
            help="Simulate FILE's kinds of device on a virtual clock; `bundled` is a hundred devices of four kinds.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that --out already holds.")] = False,
    page: Annotated[
        bool,
        typer.Option("--page", help="Serve a live page of the run to browsers on this machine; prints its address."),
    ] = False,
    profile: _Profile = False,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Run a whole federation on this machine.

    Without a job file it runs the bundled demo: ten households teach a small language model to operate devices it has
    never heard of. Examples:

        fedtune simulate

        fedtune simulate job.toml --out runs/first

        fedtune simulate --page --set federation.rounds=40 --set simulation.dropout=0.2
    """
    from fedtune.core.job.settings import BUNDLED
    from fedtune.data.job_inputs import job_or_demo

    kinds = []
    if fleet:
        named = fleet if str(fleet) == BUNDLED else fleet.absolute()
        kinds.append(f"simulation.fleet={json.dumps(str(named))}")
    resolved = job_or_demo(job, [*(overrides or []), *kinds])
    directory = out or _next_run_directory(job.stem if job else "demo")
    with _running(directory, quiet or as_json) as display, _live_page(directory, page, display) as told:
        summary = context.obj.simulate(resolved, directory, told, force, profile)
    if as_json:
        print(json.dumps(summary, indent=2))


@app.command()
def resume(
    context: typer.Context,
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of an interrupted run.")],
    page: _Page = False,
    profile: _Profile = False,
    quiet: _Quiet = False,
    as_json: _Json = False,
) -> None:
    """Go on with an interrupted run; the result is the same, bit for bit, as if nothing had happened.

    Example: fedtune resume runs/demo-1
    """
    with _running(run_directory, quiet or as_json) as display, _live_page(run_directory, page, display) as told:
        summary = context.obj.resume(run_directory, told, profile)
    if as_json:
        print(json.dumps(summary, indent=2))


@app.command()
def report(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory.")],
    compare: Annotated[
        list[Path] | None,
        typer.Option("--compare", metavar="RUN_DIR", help="Compare it with another run; may be given again."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Where to write; by default report.html or comparison.html in RUN_DIR."
        ),
    ] = None,
) -> None:
    """Write a run's HTML report again, or a page that compares several runs.

    A run writes its own report when it ends. Examples:

        fedtune report runs/demo-1

        fedtune report runs/demo-1 --compare runs/demo-2 --out both.html
    """
    from fedtune.server.report import write_comparison, write_report

    if compare:
        print(write_comparison([run_directory, *compare], out or run_directory / "comparison.html"))
    else:
        print(write_report(run_directory, out))


@app.command()
def plan(
    base: Annotated[
        str | None, typer.Option("--base", metavar="DIR", help="The base model; by default the job's, or the demo's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="This device's examples; their lengths count.")
    ] = None,
    job: Annotated[Path | None, typer.Option("--job", metavar="JOB.toml", help="A job file to plan for.")] = None,
    overrides: _Set = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", metavar="MB", min=1, help="Plan for this much memory instead of what is free now."),
    ] = None,
    uplink: Annotated[
        float | None, typer.Option("--uplink", metavar="KBIT/S", min=0.001, help="Speed of the link to the server.")
    ] = None,
    downlink: Annotated[
        float | None, typer.Option("--downlink", metavar="KBIT/S", min=0.001, help="Speed of the link from the server.")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", metavar="SECONDS", min=0.001, help="How long a round may take.")
    ] = None,
    try_step: Annotated[
        bool, typer.Option("--try/--no-try", help="Check the plan with one real training step.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, and nothing else.")] = False,
) -> None:
    """Measure this device and print the plan it would train under.

    The plan says how the base model is held, at what precision, which rank and how many tokens at once the device
    trains, and what memory and time that should take. A model directory is trained by torch, and an edge pack, which
    fedtune edge pack writes, by onnxruntime, without torch.

    Example: fedtune plan --base /models/Qwen3-0.6B --data mine.jsonl --uplink 2000 --deadline 600
    """
    from fedtune.core.job.job_file import load_job
    from fedtune.data.job_inputs import is_pack, job_or_demo, own_data_file, source_of
    from fedtune.data.records import read_records

    chosen = [f"model.base={json.dumps(str(Path(base).absolute()) if Path(base).is_dir() else base)}"] if base else []
    changes = [*(overrides or []), *chosen]
    resolved = load_job(None, changes) if base and not job else job_or_demo(job, changes)
    if not is_pack(Path(resolved.model.base)):
        source_of(resolved.model.base)
    if data is not None:
        read_records(own_data_file(data), resolved.data.skip_bad)
    from fedtune.client.plan.calibration import CalibrationStore
    from fedtune.client.plan.device_plan import Link, default_folder, this_device
    from fedtune.client.plan.plan_table import print_plan
    from fedtune.core.job.unusual import Surroundings, unusual
    from fedtune.model.shape import adapted_modules

    per_second = [rate and rate * 1000 / 8 for rate in (uplink, downlink)]
    note = (Silent() if as_json else Terminal(error_console())).note
    planner = this_device(CalibrationStore(default_folder()), note)
    shape = planner.backends.of(resolved.model.base).shape(resolved.model)
    adapted_modules(shape.linear, resolved.adapter)  # refuses what no device could train
    for warning in unusual(resolved, Surroundings(shape.width, shape.positions)):
        note(warning)
    outcome = planner.plan(
        resolved,
        data,
        Link(per_second[0], per_second[1], deadline),
        "always" if try_step else "never",
        memory=round(memory * 1e6) if memory else None,
    )
    if as_json:
        print(json.dumps(outcome.to_json(), indent=2))
    else:
        print_plan(Console(highlight=False), outcome)


for command in (track, init, check, export, serve, chat):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("fedtune"))
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Federated QLoRA fine-tuning of language models, from cloud to edge."""
    del version


def main(arguments: Sequence[str] | None = None, programs: Programs | None = None) -> None:
    """Runs the command line and exits: with 0 after success, 1 if the run failed, 2 on wrong input, 130 if interrupted.

    Args:
        arguments: the words after `fedtune`; by default the process's own.
        programs: the functions behind the long-running commands; by default fedtune's own.
    """
    prepare_environment()
    try:
        app(arguments, obj=programs or Programs())
    except FedtuneError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "fedtune":
            raise
        _fail(MissingExtraError("this command", "server", package))


def _fail(error: FedtuneError) -> None:
    error_console().print(str(error), markup=False, style="red" if sys.stderr.isatty() else None)
    sys.exit(error.exit_status)


def _running(directory: Path, silent: bool) -> AbstractContextManager[Display]:
    """Shows a run's progress, and tells the user how to resume it when Ctrl-C ends it."""

    def advice() -> str:
        begun = (directory / "job.toml").is_file()
        return f"what finished is safe, go on with: fedtune resume {directory}" if begun else "nothing has started"

    return shown(silent, advice)


@contextmanager
def _live_page(directory: Path, wanted: bool, display: Display) -> Iterator[Display]:
    """Serves the live page of a run, if it is wanted; gives the display that tells the page as well."""
    if not wanted:
        yield display
        return
    try:
        from fedtune.server.watch.live_page import page_routes
        from fedtune.server.watch.live_run import LiveRun, Shown
        from fedtune.server.watch.watch_server import WatchServer
    except ModuleNotFoundError as error:
        raise MissingExtraError("--page", "server", error.name or "starlette") from None
    live = LiveRun(lambda: Shown(directory.name, directory))
    with WatchServer(page_routes(live), "0") as url:
        error_console().print(f"live page at {url}/")  # also where the run itself prints nothing, or JSON
        yield Several(display, live)


def _next_run_directory(name: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


if __name__ == "__main__":
    main()
