"""`fedtune fleet ...`: the commands of a fleet's owner. Each imports its dependencies when it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.core.errors import InputError, PeerError
from fedtune.core.manifest.fleet_log import DAYS, Fleet
from fedtune.core.manifest.joining import MAX_REQUEST_BYTES, JoinRequest, fingerprint
from fedtune.core.text import counted

if TYPE_CHECKING:
    from fedtune.core.manifest.model_release import ModelRelease
    from fedtune.server.fleet.owner_home import OwnerHome
    from fedtune.server.live.server_home import ServerHome

app = typer.Typer(
    help="Own a fleet: approve and revoke its devices, and sign its jobs and models, with a key that no server has.",
    no_args_is_help=True,
    suggest_commands=False,
)

_Home = Annotated[
    Path | None,
    typer.Option("--home", envvar="FEDTUNE_FLEET_HOME", help="The owner's folder; by default ~/.fedtune/fleet."),
]
_Server = Annotated[
    Path | None,
    typer.Option(
        "--server-home",
        envvar="FEDTUNE_SERVER_HOME",
        help="The server's folder, where it is on this machine; by default ~/.fedtune/server, if that is there.",
    ),
]
_Days = Annotated[
    float, typer.Option("--days", min=0.01, max=3650, help="How long devices trust this without a newer one.")
]
_DAY = 86_400.0
_BOTH = "this machine holds the fleet's key beside the server: good for a try-out, not against whoever breaks into it"


@app.command()
def init(home: _Home = None) -> None:
    """Make a fleet: its key, and a log without devices. Do it on a machine of your own, not on the server.

    Then, on the server: fedtune server init --address HOST:PORT --fleet fleet.pub
    """
    from fedtune.server.fleet.owner_home import OwnerHome, default_home

    made = OwnerHome.create(home or default_home())
    print(f"made {made.path}: the fleet's key and its log; keep a backup, and keep it off the server")
    print(f"the fleet's key: {fingerprint(made.first_key)}")
    print(f"next, on the server: fedtune server init --address HOST:PORT --fleet {made.path / 'fleet.pub'}")


@app.command()
def approve(
    wanted: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CODE|FILE]...", help="Codes that devices show, or files of requests, request.json."),
    ] = None,
    everyone: Annotated[
        bool, typer.Option("--all", help="Approve all that wait. For a try-out: the server could have made them.")
    ] = False,
    days: _Days = DAYS,
    home: _Home = None,
    server_home: _Server = None,
) -> None:
    """Approve devices, by the codes that they show; without codes, list the requests on this machine's server.

    Example: fedtune fleet approve QX4T-2ZLM-7KWA-P3VN
    """
    owner, server = _open(home), _server(server_home)
    known = {request.code: request for request in _waiting(server)}
    if not wanted and not everyone:
        for code, request in known.items():
            print(f"{code}  {request.name}")
        number = counted(len(known), "device waits", "devices wait")
        print(f"{number}; compare each code with the one that its device shows")
        return
    chosen = list(known.values()) if everyone else [_request(text, known) for text in wanted or ()]
    if not chosen:
        raise InputError("no device waits for approval; on a device: fedtune client join invitation.json --data FILE")
    fleet = owner.approve(chosen, days)
    print(f"approved: {', '.join(request.name for request in chosen)}")
    _hand_over(owner, fleet, server)


@app.command()
def revoke(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The devices' names.")],
    days: _Days = DAYS,
    home: _Home = None,
    server_home: _Server = None,
) -> None:
    """Revoke devices: they leave the fleet, and a server that has the new log cuts them off within seconds."""
    owner = _open(home)
    fleet = owner.revoke(names, days)
    print(f"revoked: {', '.join(names)}")
    _hand_over(owner, fleet, _server(server_home))


@app.command()
def renew(days: _Days = DAYS, home: _Home = None, server_home: _Server = None) -> None:
    """Renew the log before it expires, without a change; devices stop working for a server that has no fresh one."""
    from fedtune.core.manifest.fleet_log import Change

    owner = _open(home)
    _hand_over(owner, owner.change(Change(), days), _server(server_home))


@app.command()
def rotate(days: _Days = DAYS, home: _Home = None, server_home: _Server = None) -> None:
    """Replace the fleet's key: the old key names the new one, and devices follow. Sign jobs and models again."""
    owner = _open(home)
    fleet = owner.rotate(days)
    print(f"the fleet's key is now {fingerprint(fleet.key)}; jobs that wait must be signed and submitted again,")
    print("and the model that devices are to install released again: fedtune fleet publish MODEL_DIR")
    _hand_over(owner, fleet, _server(server_home))


@app.command()
def sign(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Override one key of the job file; may be given again. A path starts at the job file's folder.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The job's name; by default the file's.")] = None,
    days: _Days = DAYS,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to write; by default NAME.manifest.")
    ] = None,
    home: _Home = None,
) -> None:
    """Sign a job: read it, load its base model here, and write the manifest without which no device trains.

    The server gets both files: fedtune server submit JOB.toml --manifest NAME.manifest, with the same --set.
    """
    from fedtune.core.host.private_files import write_private
    from fedtune.core.job.job_file import load_job
    from fedtune.data.job_inputs import source_of

    key, resolved, chosen = _open(home).key, load_job(job, overrides or []), name or job.stem
    source_of(resolved.model.base)
    from fedtune.server.fleet.signing import sign_job  # torch takes long to import: mistakes are named before

    manifest = sign_job(key, resolved, chosen, days)
    path = out or Path(f"{chosen}.manifest")
    write_private(path, manifest.data)
    print(f"{path}: the job {chosen}, terms {manifest.terms.digest[:16]}…, valid for {counted(days, 'day')}")


@app.command()
def publish(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A job's exported model: runs/first/onnx with all its formats, or one of them; or an edge pack.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="The job's name on the server; by default the model's.")
    ] = None,
    days: _Days = DAYS,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to write; by default NAME.release.")
    ] = None,
    home: _Home = None,
    server_home: _Server = None,
) -> None:
    """Release an exported model or an edge pack to devices: check its files, and sign them under the next number.

    Devices install only what is released, and nothing from before the release they have. To return the fleet to an
    older model, publish that one again. Try a model before you sign it: fedtune chat MODEL_DIR

    The server gets the file: fedtune server offer NAME.release. Example: fedtune fleet publish runs/first/onnx
    """
    from fedtune.core.host.private_files import write_private
    from fedtune.server.fleet.releasing import release_model

    owner, server = _open(home), None if out else _server(server_home)
    if server is None:
        release = release_model(owner, directory, name, days)
        path = out or Path(f"{release.name}.release")
        write_private(path, release.data)
        print(f"{_state(release, days)}; carry {path} to the server: fedtune server offer {path}")
        return
    from fedtune.server.live.model_registry import ModelRegistry

    registry = ModelRegistry(server)
    release = release_model(owner, directory, name, days, registry.check)
    registry.take(release.data)
    print(f"{_state(release, days)}; offered by the server in {server.path}")
    print(_BOTH)


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False, home: _Home = None
) -> None:
    """Show the fleet's key, its devices, and how long its log is still valid."""
    owner = _open(home)
    fleet = owner.fleet
    days = (fleet.expires - time.time()) / _DAY
    if as_json:
        found = {
            "fingerprint": fingerprint(fleet.key),
            "first_fingerprint": fingerprint(owner.first_key),
            "entry": fleet.number,
            "days_left": days,
            "devices": sorted(fleet.devices),
        }
        print(json.dumps(found, indent=2))
        return
    print(f"the fleet's key: {fingerprint(fleet.key)}")
    if owner.first_key != fleet.key:
        print(f"its first key, which invitations show: {fingerprint(owner.first_key)}")
    print(f"log: {counted(fleet.number, 'entry', 'entries')}, valid for {counted(round(days), 'more day')}")
    print(f"{counted(len(fleet.devices), 'device')}: {', '.join(sorted(fleet.devices)) or 'none yet'}")


def _state(release: ModelRelease, days: float) -> str:
    return f"release {release.number}: {release.name}, {', '.join(release.models)}, valid for {counted(days, 'day')}"


def _hand_over(owner: OwnerHome, fleet: Fleet, server: ServerHome | None) -> None:
    """Gives the log to a server on this machine, or says how to carry it."""
    state = f"entry {fleet.number} of the fleet's log, {counted(len(fleet.devices), 'device')}"
    if server is None:
        print(f"{state}; carry {owner.path / 'fleet.jsonl'} to the server: fedtune server publish fleet.jsonl")
        return
    from fedtune.server.live.enrolled_devices import publish

    publish(server, owner.log)
    print(f"{state}; published to the server in {server.path}")
    print(_BOTH)


def _request(text: str, known: dict[str, JoinRequest]) -> JoinRequest:
    from fedtune.core.host.private_files import read_bounded

    if text.upper() in known:
        return known[text.upper()]
    path = Path(text)
    if not path.is_file():
        waiting = ", ".join(f"{code} ({request.name})" for code, request in known.items()) or "none"
        raise InputError(f"{text[:80]}: no such code waits here, and no such file; waiting: {waiting}")
    try:
        return JoinRequest.from_bytes(read_bounded(path, "a request to join", MAX_REQUEST_BYTES))
    except PeerError as error:
        raise InputError(f"{path}: {error}") from None


def _waiting(server: ServerHome | None) -> list[JoinRequest]:
    if server is None:
        return []
    from fedtune.server.live.enrolled_devices import waiting

    return waiting(server)


def _open(home: Path | None) -> OwnerHome:
    from fedtune.server.fleet.owner_home import OwnerHome, default_home

    return OwnerHome(home or default_home())


def _server(home: Path | None) -> ServerHome | None:
    """Returns the server of this machine, if there is one."""
    from fedtune.server.live.server_home import ServerHome, default_home

    path = home or default_home()
    return ServerHome(path) if home or (path / "server.toml").is_file() else None
