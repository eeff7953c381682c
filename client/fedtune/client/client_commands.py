"""`fedtune client ...`: the commands of a device. Each imports its dependencies when it runs."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.client import model_commands
from fedtune.client.device_option import Home, open_device
from fedtune.client.owner_bounds import DEFAULT_BOUNDS, Bounds
from fedtune.client.plan.eligibility import CAUTIOUS, DEFAULT_REQUIREMENTS, Consent, Requirements
from fedtune.core.errors import InputError, MissingExtraError, install_line
from fedtune.core.text import counted

if TYPE_CHECKING:  # the class is imported when a command runs
    from fedtune.client.live.device_home import ClientHome
    from fedtune.client.live.device_status import Status
    from fedtune.core.manifest.joining import JoinRequest

app = typer.Typer(help="Make this machine a device of a fleet.", no_args_is_help=True, suggest_commands=False)

STOP_SECONDS = 60.0


@app.command()
def join(
    invitation: Annotated[
        Path, typer.Argument(metavar="INVITATION", help="The invitation.json that `fedtune server init` wrote.")
    ],
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="This device's examples; they stay here.")],
    name: Annotated[
        str | None, typer.Option("--name", help="The device's name in the fleet; by default this machine's.")
    ] = None,
    base: Annotated[
        list[Path] | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="A base model's directory on this device, or an edge pack of it, which needs no torch; may be given "
            "again.",
        ),
    ] = None,
    allow_clear: Annotated[
        bool,
        typer.Option("--allow-clear", help="Also take part in jobs whose server sees this device's own updates."),
    ] = False,
    scores: Annotated[
        bool,
        typer.Option(
            "--scores",
            help="Also score adapters on held-out examples. The server sees this device's own scores; a dishonest "
            "one could request many.",
        ),
    ] = False,
    only_charging: Annotated[
        bool, typer.Option("--only-charging", help="Do not train on battery, however full.")
    ] = DEFAULT_REQUIREMENTS.only_charging,
    battery_reserve: Annotated[
        float,
        typer.Option(
            "--battery-reserve", metavar="PERCENT", min=0, max=100, help="On battery, train only above this charge."
        ),
    ] = DEFAULT_REQUIREMENTS.battery_reserve,
    max_temperature: Annotated[
        float,
        typer.Option("--max-temperature", metavar="C", min=1, max=150, help="Do not train while a sensor is hotter."),
    ] = DEFAULT_REQUIREMENTS.max_temperature,
    unmetered_only: Annotated[
        bool, typer.Option("--unmetered-only", help="Do not train over mobile broadband.")
    ] = DEFAULT_REQUIREMENTS.unmetered_only,
    min_cohort: Annotated[
        int, typer.Option("--min-cohort", metavar="N", min=3, help="Be summed with this many clients at least.")
    ] = DEFAULT_BOUNDS.min_cohort,
    max_corrupt: Annotated[
        float,
        typer.Option(
            "--max-corrupt", metavar="SHARE", min=0, max=0.99, help="Stand this share of colluders in a cohort."
        ),
    ] = DEFAULT_BOUNDS.max_corrupt,
    max_devices: Annotated[
        int | None, typer.Option("--max-devices", metavar="N", min=1, help="Refuse a fleet of more devices.")
    ] = DEFAULT_BOUNDS.max_devices,
    max_rounds: Annotated[
        int | None, typer.Option("--max-rounds", metavar="N", min=1, help="Join this many sums of a job at most.")
    ] = DEFAULT_BOUNDS.max_rounds,
    min_difference: Annotated[
        int,
        typer.Option(
            "--min-difference",
            metavar="N",
            min=0,
            help="Vote for no sum whose clients differ from an earlier one's by 1 to N-1.",
        ),
    ] = DEFAULT_BOUNDS.min_difference,
    max_epsilon: Annotated[
        float | None,
        typer.Option(
            "--max-epsilon",
            metavar="E",
            min=0.001,
            max=1000,
            help="Spend this much differential privacy in all jobs (at delta 1e-6), and join none without it.",
        ),
    ] = DEFAULT_BOUNDS.max_epsilon,
    try_step: Annotated[
        bool, typer.Option("--try/--no-try", help="Check the plan with one real training step.")
    ] = True,
    home: Home = None,
) -> None:
    """Make this machine a device, if it can train: make its keys, print its plan, and ask the fleet's owner.

    It prints a code, by which the owner approves the device: fedtune fleet approve CODE.

    Example: fedtune client join invitation.json --name kitchen --data mine.jsonl --base /models/Qwen3-0.6B
    """
    requirements = Requirements(only_charging, battery_reserve, max_temperature, unmetered_only)
    bounds = Bounds(min_cohort, max_corrupt, max_devices, max_rounds, min_difference, max_epsilon)
    consent = Consent(allow_clear, scores, requirements, bounds)
    make_device(Joining(invitation, name or _this_machine(), data, tuple(base or ()), home, consent, try_step))


@app.command()
def start(
    metrics: Annotated[
        Path | None,
        typer.Option(
            "--metrics",
            metavar="FILE.prom",
            help="Keep figures for Prometheus in this file, which node_exporter reads: a device opens no port.",
        ),
    ] = None,
    home: Home = None,
) -> None:
    """Serve the fleet in the foreground until stopped; a service manager keeps it running."""
    from fedtune.client.live.device_home import CALIBRATIONS

    def show(line: str) -> None:
        print(line, flush=True)

    device, also = open_device(home), _metrics(metrics)
    with device.lock:  # status shows "starting" from here on, since loading torch takes seconds
        try:
            from fedtune.client.live.device_loop import serve
            from fedtune.client.plan.brought_bases import usable_bases
            from fedtune.client.plan.calibration import CalibrationStore
            from fedtune.client.plan.device_plan import this_device

            planner = this_device(CalibrationStore(device.path / CALIBRATIONS), show)
            for base in usable_bases(planner, device.bases):
                planner.backends.of(base)
        except ModuleNotFoundError as error:
            raise MissingExtraError("fedtune client start", "client", error.name or "of the device") from None
        serve(device, planner, show, also)


def _metrics(path: Path | None) -> list[Callable[[Status], None]]:
    """Returns, in a list, what keeps the figures in the file; nothing without one."""
    if path is None:
        return []
    try:
        from fedtune.client.live.device_metrics import metrics_file
    except ModuleNotFoundError as error:
        raise MissingExtraError("--metrics", "client", error.name or "prometheus-client") from None
    return [metrics_file(path)]


@app.command()
def stop(home: Home = None) -> None:
    """Stop the running device process; its keys and state stay."""
    process = open_device(home).lock.stop_holder(STOP_SECONDS)
    print(f"stopped process {process}" if process else "it was not running")


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    home: Home = None,
) -> None:
    """Show whether this device runs, what it does, and its last problem; the exit status is 0 if it runs, else 1."""
    from fedtune.core.host.private_files import read_json

    device = open_device(home)
    holder = device.lock.holder()
    found: dict[str, Any] = {"name": device.config.name, "server": device.config.server, "data": device.config.data}
    found["bounds"] = asdict(device.config.bounds)
    found["code"] = request.code if (request := device.request) else None
    found["model"] = model.name if (model := device.models.current) else None
    path = device.path / "status.json"
    if path.exists():
        with suppress(InputError):  # an incomplete status file is ignored; the lock shows whether the device runs
            found |= read_json(path, "the status")
    found["running"] = holder is not None
    if holder is None:
        found["state"] = "stopped"
    elif found.get("pid") != holder:
        found["state"] = "starting"
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    if not found["running"]:
        raise typer.Exit(1)


for command in (model_commands.pull, model_commands.rollback):
    app.command()(command)


@app.command()
def leave(home: Home = None) -> None:
    """Stop the device, and remove its keys and state; the data file stays, and the log of the rounds it has served."""
    from fedtune.client.live.device_home import (
        ROUNDS,
        ClientHome,
        check_device,
        default_home,
        remove_device,
        service_lock,
    )

    path, name = home or default_home(), "NAME"
    check_device(path)
    with suppress(InputError):  # a folder that this release cannot read can be left too
        name = ClientHome(path).config.name
    if process := service_lock(path).stop_holder(STOP_SECONDS):
        print(f"stopped process {process}")
    kept = remove_device(path)
    print(f"removed {path}; the fleet's owner may now: fedtune fleet revoke {name}")
    if kept:
        print(f"kept {path / ROUNDS}: a device that joins the same fleet in this folder serves no round a second time")


@dataclass(frozen=True)
class Joining:
    """The options of `fedtune client join`.

    Args:
        invitation: the file that `fedtune server init` wrote.
        name: the device's name in the fleet.
        data: this device's examples.
        bases: directories of base models; empty for the bundled one.
        home: the device's folder; None for the default.
        consent: the owner's.
        try_step: whether a real training step checks the plan.
    """

    invitation: Path
    name: str
    data: Path
    bases: tuple[Path, ...] = ()
    home: Path | None = None
    consent: Consent = CAUTIOUS
    try_step: bool = True


def make_device(wanted: Joining) -> None:
    """Creates the device's folder and plans for its base models; removes the folder if the device cannot train.

    Raises:
        InputError: the invitation, the data or a base model cannot be used, or the folder belongs to a device already.
        NoPlanError: none of the base models fits into this machine.
    """
    from fedtune.client.live.device_home import CALIBRATIONS, ClientHome, default_home, remove_device, where
    from fedtune.core.manifest.joining import Invitation, fingerprint

    folder = wanted.home or default_home()
    invitation = Invitation.load(wanted.invitation)
    made = ClientHome.join(folder, invitation, wanted.name, wanted.data, wanted.bases, wanted.consent)
    try:
        plans = _plans(wanted.bases, wanted.data, folder / CALIBRATIONS, wanted.try_step)
    except BaseException:  # also on Ctrl-C: no device is left half made
        remove_device(folder)
        raise
    for plan in plans:
        for line in _plan_lines(plan):
            print(line)
    request = made.request
    assert request is not None
    print(
        f"{made.config.name} for server {made.config.server}, folder {made.path}; its keys were made here and stay here"
    )
    print(f"the fleet's key: {fingerprint(invitation.fleet_key)}; compare it with what its owner says")
    print(f"this device's code: {request.code}")
    if _handed_in(made, request):
        print(f"the server has the request; the fleet's owner approves it: fedtune fleet approve {request.code}")
    else:
        print(f"the server cannot be reached now; `start` tries again, or give the owner {made.path / 'request.json'}")
    print(f"next: fedtune client start{where(folder)}")


def _this_machine() -> str:
    """Returns this machine's name, as a device may have it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")[:64] or "device"


def _handed_in(device: ClientHome, request: JoinRequest) -> bool:
    """Gives the server a request to join, and returns whether it has taken it.

    Raises:
        InputError: the server refuses it.
    """
    from fedtune.client.live.joining_call import hand_in

    return hand_in(device.config.server, device.authority, request)


def _print(found: dict[str, Any]) -> None:
    state = found["state"]
    if state == "waiting" and found.get("next_try"):
        seconds, failures = max(0.0, found["next_try"] - time.time()), counted(found["trying"], "failure")
        state += f" to try again in {seconds:.1f} s, after {failures}"
    elif found.get("task"):
        state += f" ({found['task']})"
    print(f"device {found['name']} of {found['server']}: {state}")
    if found.get("contact"):
        print(
            f"last contact {time.time() - found['contact']:.0f} s ago, {counted(found['answered'], 'message')} answered"
        )
    if found.get("clock_error"):
        print(f"clock: {found['clock_error']:+.0f} s off the server's, corrected")
    if found.get("sits_out"):
        print(f"sits out: {found['sits_out']}")
    if found.get("code"):
        print(f"not approved yet; code {found['code']}: fedtune fleet approve {found['code']}")
    for line in _plan_lines(found["plan"]) if found.get("plan") else ():
        print(line)
    print(f"bounds: {Bounds(**found['bounds']).shown}")
    if found.get("warning"):
        print(f"warning: {found['warning']}")
    if found["model"]:
        print(f"model: {found['model']}")
    if found.get("problem"):
        print(f"last problem, {time.time() - found['problem_time']:.0f} s ago: {found['problem']}")


def _plans(bases: tuple[Path, ...], data: Path, calibrations: Path, try_step: bool) -> list[dict[str, Any]]:
    """Returns a plan for each base model that can be trained here; none on a machine that can only answer."""
    try:
        from fedtune.client.plan.brought_bases import plan_bases
        from fedtune.client.plan.calibration import CalibrationStore
        from fedtune.client.plan.device_plan import this_device
        from fedtune.core.job.settings import DEMO

        planner = this_device(CalibrationStore(calibrations), print)
        if not bases and not planner.backends.installed(DEMO):
            print(
                f"no torch here, and no edge pack: this device can pull models and answer. To train: "
                f"{install_line('client')}, or join with --base DIR for an edge pack, or pull one when the fleet's "
                "owner has approved this device: fedtune client pull NAME --format edge"
            )
            return []
    except ModuleNotFoundError:
        print(f"this device can pull models and answer. To train: {install_line('client')}")
        return []
    outcomes = plan_bases(planner, bases, data, "always" if try_step else "never")
    return [outcome.to_json() for outcome in outcomes]


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    """Formats a plan for people, with the measurements beside the predictions."""
    chosen, predicted, tried, took = plan["plan"], plan["predicted"], plan["measured"], plan.get("took")
    unpacking = "bitsandbytes" if chosen["native_nf4"] else "torch"
    weights = {
        "dequantized": "dequantized once",
        "packed": f"packed, unpacked by {unpacking}",
        "mapped": f"edge pack, {_mb(predicted['mapped'])} of weights mapped",
        "unpacked": f"edge pack, {_mb(predicted['mapped'])} of weights unpacked once",
    }[chosen["weights"]]
    rank = f"rank {chosen['tier']} of {chosen['rank']}"
    passes = f"{chosen['micro_batch_tokens']} at once, {counted(chosen['accumulation'], 'time')} a step"
    checkpointing = ", gradient checkpointing" if chosen["gradient_checkpointing"] else ""
    batch = f"{chosen['sequence_length']} tokens an example, {passes}{checkpointing}"
    limit = f"{_mb(predicted['budget'])} allowed, beside {_mb(predicted['runtime'])} of program"
    seconds = took["predicted_seconds"] if took else predicted["seconds_per_round"]
    lines = [
        f"plan for {plan['model']['base']}: {weights}, {chosen['precision']}, {rank}, {batch}",
        f"trainer: {chosen['trainer']}",
        f"predicted: {_mb(predicted['peak'])} ({limit}), {seconds:.1f} s a round",
    ]
    if tried:
        lines.append(f"one step:  {_mb(tried['peak_bytes'])}, {_mb(tried['predicted_peak_bytes'])} predicted")
    if took and took["rounds"]:
        most = "not measurable" if took["peak_bytes"] is None else f"{_mb(took['peak_bytes'])} at most"
        lines.append(f"measured:  {most}, {took['seconds']:.1f} s in the last of {counted(took['rounds'], 'round')}")
    return lines


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"
