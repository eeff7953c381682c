"""The `fedtune server` commands. Each one imports the modules it needs when it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.core.errors import InputError, MissingExtraError, PeerError
from fedtune.core.text import counted
from fedtune.server import job_commands
from fedtune.server.server_options import AsJson, Home, open_server

if TYPE_CHECKING:  # the classes themselves are imported when a command runs
    from fedtune.core.job.settings import Job
    from fedtune.core.manifest.job_manifest import JobManifest
    from fedtune.server.fleet.owner_home import OwnerHome
    from fedtune.server.live.job_queue import QueuedJob
    from fedtune.server.live.server_home import ServerHome
    from fedtune.server.run_display import Display

app = typer.Typer(
    help="Run a fleet's server: take the fleet's log, submit jobs, watch them.",
    no_args_is_help=True,
    suggest_commands=False,
)

STOP_SECONDS = 30.0
LARGEST_PRIORITY = 999
LOOPBACK_NAMES = ("localhost", "127.0.0.1")

_Host = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="NAME", help="A further name or address for the certificate; may be given again."),
]
_Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override one key of the job file; may be given again. A path starts at the job file's folder, or without "
        "one at the working directory.",
    ),
]


@app.command()
def init(
    address: Annotated[
        str, typer.Option("--address", metavar="HOST:PORT", help="Where devices will reach the server.")
    ],
    host: _Host = None,
    listen: Annotated[
        str | None,
        typer.Option("--listen", help="Address of the interface to listen on; by default all, or loopback's own."),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Port to listen on; by default the address's.")
    ] = None,
    fleet: Annotated[
        Path | None,
        typer.Option(
            "--fleet",
            metavar="FILE",
            help="The owner's fleet.pub. Without it this machine plays the owner too, in ~/.fedtune/fleet.",
        ),
    ] = None,
    home: Home = None,
) -> None:
    """Make a server: its folder, its certificate authority and its certificate, and the invitation for devices.

    Example: fedtune server init --address fleet.example.org:8443 --host 192.0.2.7 --fleet fleet.pub
    """
    from fedtune.core.manifest.joining import check_address, fingerprint, read_public
    from fedtune.server.live.server_home import INVITATION, ServerConfig, ServerHome, default_home

    name, _, told = check_address(address).rpartition(":")
    everywhere = "127.0.0.1" if name in LOOPBACK_NAMES else ServerConfig.listen
    config = ServerConfig(address=address, listen=listen or everywhere, port=int(told) if port is None else port)
    key = read_public(fleet) if fleet else _own_fleet()
    made = ServerHome.create(home or default_home(), config, host or [], key)
    print(f"made {made.path}: keys, certificate and server.toml, for this user only")
    print(f"it will listen on {config.listen}:{config.port}")
    print(f"the fleet's key: {fingerprint(key)}")
    join = f"fedtune client join {made.path / INVITATION} --data FILE"
    print(f"next: fedtune server start{_where(made.path)}, and on each device: {join}")


@app.command()
def renew(host: _Host = None, home: Home = None) -> None:
    """Make a new server certificate under the same authority; takes effect when the server starts again."""
    server = open_server(home)
    server.renew(host or [])
    print(f"renewed: {counted(round(server.certificate_days_left()), 'day')}; restart the server to use it")


@app.command()
def publish(
    log: Annotated[Path, typer.Argument(metavar="FILE", help="The fleet.jsonl of the fleet's owner.")],
    home: Home = None,
) -> None:
    """Take the fleet's log from its owner; devices that it revokes are cut off within seconds."""
    from fedtune.core.host.private_files import read_bounded
    from fedtune.core.manifest.fleet_log import MAX_LOG_BYTES
    from fedtune.server.live.enrolled_devices import publish as run

    fleet = run(open_server(home), read_bounded(log, "the fleet's log", MAX_LOG_BYTES))
    print(f"entry {fleet.number} of the fleet's log, {counted(len(fleet.devices), 'device')}")


@app.command()
def offer(
    release: Annotated[Path, typer.Argument(metavar="FILE", help="The NAME.release of the fleet's owner.")],
    home: Home = None,
) -> None:
    """Offer a job's model or an edge pack to devices, once the owner has released it with fedtune fleet publish."""
    from fedtune.core.host.private_files import read_bounded
    from fedtune.core.protocol.model_requests import MAX_RELEASE_BYTES
    from fedtune.server.live.model_registry import ModelRegistry

    data, registry = read_bounded(release, "a release", MAX_RELEASE_BYTES), ModelRegistry(open_server(home))
    try:
        taken = registry.take(data)
    except PeerError as error:
        raise InputError(f"{release}: {error}; expected a file that fedtune fleet publish has written") from None
    print(f"release {taken.number}: {taken.name}, {', '.join(taken.models)}")


@app.command()
def start(
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="[HOST:]PORT",
            help="Serve a live page at http://HOST:PORT/ and figures for Prometheus at /metrics, to this machine alone "
            "unless HOST says otherwise. Both have figures of jobs, rounds and devices, and the devices' names.",
        ),
    ] = None,
    home: Home = None,
) -> None:
    """Serve devices and work on jobs until stopped; interrupted jobs go on by themselves.

    Example: fedtune server start --metrics 9464
    """
    from fedtune.server.run_display import Terminal

    server = open_server(home)
    with server.lock, Terminal() as display:  # from here on it is starting: torch takes long to import
        try:
            from fedtune.server.live.resident_server import Service
        except ModuleNotFoundError as error:
            raise MissingExtraError("fedtune server start", "server", error.name or "of the server") from None
        if metrics is None:
            Service(server, [display]).run()
        else:
            _serve_with_metrics(server, display, metrics)


@app.command()
def stop(home: Home = None) -> None:
    """End the running server; the job it was working on goes on when it starts again."""
    process = open_server(home).lock.stop_holder(STOP_SECONDS)
    print(f"stopped process {process}" if process else "it was not running")


@app.command()
def submit(
    job: Annotated[
        Path | None, typer.Argument(metavar="[JOB.toml]", help="The job file; without one, the bundled demo.")
    ] = None,
    overrides: _Set = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The run's name; by default the job file's, with a number.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            metavar="FILE",
            help="The job as the owner has signed it with fedtune fleet sign. By default it is signed here, where the "
            "owner's folder is on this machine.",
        ),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Return when the job has ended; where the owner's folder is on this machine, release its model then.",
        ),
    ] = False,
    priority: Annotated[
        int,
        typer.Option(
            "--priority",
            min=-LARGEST_PRIORITY,
            max=LARGEST_PRIORITY,
            help="Jobs of a larger number are worked on first; the job in progress is not interrupted. To change it, "
            "submit the waiting job again under its name.",
        ),
    ] = 0,
    home: Home = None,
) -> None:
    """Put a job in the queue; the server, running now or later, works on it.

    Devices bring their own data: of [data] the server reads `evaluation`, and not `train`.

    Example: fedtune server submit job.toml --set federation.rounds=40 --wait
    """
    from fedtune.core.errors import JobError
    from fedtune.data.job_inputs import job_or_demo
    from fedtune.server.live.enrolled_devices import Devices
    from fedtune.server.live.job_queue import CANCELLED, FAILED, Jobs
    from fedtune.server.preflight import check_server_job

    server = open_server(home)
    jobs = Jobs(server)
    resolved = job_or_demo(job, overrides or [])
    inputs = check_server_job(resolved)  # reports mistakes here rather than in the server's log
    from fedtune.core.job.unusual import Surroundings, unusual
    from fedtune.model.shape import adapted_modules, layout_of_sizes, shape_of
    from fedtune.server.privacy_plan import plan_privacy

    shape = shape_of(resolved.model)
    adapted_modules(shape.linear, resolved.adapter)
    for warning in unusual(resolved, Surroundings(shape.width, shape.positions, len(inputs.evaluation))):
        print(warning)
    wanted, devices = resolved.federation.clients_per_round, len(Devices.load(server).fleet.devices)
    if resolved.privacy.mode != "off":
        try:
            advice = plan_privacy(resolved, layout_of_sizes(shape.linear, resolved.adapter), max(devices, 1)).advice
        except JobError as error:  # of the devices that are there now; more may come
            advice = error.problems
        for sentence in advice:
            print(sentence)
    if isinstance(wanted, int) and wanted > devices:
        print(
            f"federation.clients_per_round is {wanted}, and the fleet has {counted(devices, 'device')} now: all that "
            "are there are in every round"
        )
    signed = (
        _given(manifest) if manifest else _signed(server, resolved, name or jobs.free_name(job.stem if job else "demo"))
    )
    queued = jobs.submit(resolved, signed, priority)
    print(f"submitted {queued.name}; its run directory: {jobs.run_path(queued)}")
    if not manifest:
        print("signed here: this machine plays the fleet's owner too, which is good for a try-out")
    if server.lock.holder() is None:
        print(f"the server is not running; start it with: fedtune server start{_where(server.path)}")
    elif not wait:
        print(f"the server works on it when its turn comes; watch it with: fedtune server show {queued.name}")
    while wait and queued.name not in jobs.finished():
        state, entry = jobs.find(queued.name)
        if state in (FAILED, CANCELLED):
            raise InputError(f"{queued.name} {state}: {entry.outcome().reason}")
        time.sleep(1.0)
    if resolved.export.formats:
        _release(server, queued, jobs.run_path(queued), wait)


@app.command()
def status(as_json: AsJson = False, home: Home = None) -> None:
    """Show the server, its devices, its jobs and the last problems; exit status 0 if it is running, 1 if not."""
    from rich.console import Console

    from fedtune.server.live.status_board import print_status, read_status

    found = read_status(open_server(home))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_status(Console(highlight=False), found)
    if found["state"] != "running":
        raise typer.Exit(1)


for command in (job_commands.jobs, job_commands.show, job_commands.cancel, job_commands.logs, job_commands.fetch):
    app.command()(command)


def _serve_with_metrics(server: ServerHome, display: Display, address: str) -> None:
    from fedtune.server.live.resident_server import Service

    try:
        from fedtune.server.live.fleet_metrics import FleetMetrics
        from fedtune.server.watch.run_metrics import RunMetrics, metrics_route
    except ModuleNotFoundError as error:
        raise MissingExtraError("--metrics", "server", error.name or "prometheus-client") from None
    from fedtune.server.live.board_page import live_run
    from fedtune.server.watch.live_page import page_routes
    from fedtune.server.watch.watch_server import WatchServer

    metrics = RunMetrics()
    service = Service(server, [display, metrics])
    metrics.registry.register(FleetMetrics(server, service.jobs, service.board))
    live = live_run(server, service.board)
    with WatchServer([*page_routes(live), metrics_route(metrics)], address) as url, service.display.also(live):
        display.note(f"live page at {url}/, metrics at {url}/metrics")
        service.run()


def _own_fleet() -> bytes:
    """Returns the key of the owner's folder on this machine, which is made where there is none."""
    from fedtune.server.fleet.owner_home import OwnerHome, default_home

    path = default_home()
    owner = OwnerHome(path) if (path / "fleet.key").is_file() else OwnerHome.create(path)
    print(f"this machine plays the fleet's owner too, in {owner.path}: good for a try-out. For a real fleet make that")
    print("folder on a machine of your own: fedtune fleet init, then fedtune server init --fleet fleet.pub")
    return owner.first_key


def _owner_here(server: ServerHome) -> OwnerHome | None:
    """Returns the owner of a server's fleet, if the owner's folder is on this machine."""
    from fedtune.server.fleet.owner_home import OwnerHome, default_home

    path = default_home()
    owner = OwnerHome(path) if (path / "fleet.key").is_file() else None
    return owner if owner is not None and owner.first_key == server.fleet_key else None


def _signed(server: ServerHome, job: Job, name: str) -> JobManifest:
    """Signs a job with the owner's key on this machine.

    Raises:
        InputError: the owner's key is elsewhere.
    """
    from fedtune.server.fleet.signing import sign_job

    if (owner := _owner_here(server)) is None:
        raise InputError(
            "a job needs the signature of the fleet's owner, whose key is not on this machine. Where it is: "
            "fedtune fleet sign JOB.toml; then here: fedtune server submit JOB.toml --manifest FILE"
        )
    return sign_job(owner.key, job, name)


def _release(server: ServerHome, job: QueuedJob, run: Path, finished: bool) -> None:
    """Releases a finished job's model with the owner's key on this machine, or says what releases it."""
    owner, models = _owner_here(server), run / "onnx"
    if owner is None:
        print("devices install its model once it is released, when it has finished; on the owner's machine, with its")
        print(f"exports: fedtune fleet publish {models}; then here: fedtune server offer {job.name}.release")
        return
    if not finished:
        print("devices install its model once it is released, as --wait does; when it has finished:")
        print(f"fedtune fleet publish {models} --server-home {server.path}")
        return
    from fedtune.server.fleet.releasing import release_model
    from fedtune.server.live.model_registry import ModelRegistry

    registry = ModelRegistry(server)
    release = release_model(owner, models, job.name, check=registry.check)
    registry.take(release.data)
    print(f"release {release.number}: {release.name}, {', '.join(release.models)}, signed here: this machine plays the")
    print("fleet's owner too, which is good for a try-out")


def _given(path: Path) -> JobManifest:
    """Reads a manifest; the server and every device check its signature."""
    from fedtune.core.host.private_files import read_bounded
    from fedtune.core.manifest.job_manifest import JobManifest
    from fedtune.core.protocol.registration import MAX_MANIFEST_BYTES

    try:
        return JobManifest.unchecked(read_bounded(path, "a job's manifest", MAX_MANIFEST_BYTES))
    except PeerError as error:
        raise InputError(f"{path}: {error}") from None


def _where(path: Path) -> str:
    """Returns the option that names a server's folder in a command; empty for the default one."""
    from fedtune.server.live.server_home import default_home

    return "" if path == default_home() else f" --home {path}"
