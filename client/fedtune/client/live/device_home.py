"""A device's folder: its keys, its roster, and its state between rounds; private to its owner.

`leave` removes it but for the logs in rounds/, without which a device that joins again could be asked for the same
updates a second time.

device.json         name, server, data file, base models, conditions for taking part
authority.pem       certificate authority of the server's certificate
node.key            key that signs requests to the server
identity.key        identity key for secure aggregation
fleet.jsonl         the fleet's log: the other devices, as the owner has signed it
request.json        the request to join, until the owner has approved it
rounds/             what was served of each job, one log for each fleet, by the fleet's first key
jobs/               residuals, adapters and manifest, by the digest of a job's terms
uplink              bytes a second of the last upload
calibration/        measurements of trial steps, by base model
working             the message in work, until the server has its answer
models/             pulled models, their last release, and links to the current and the previous one
status.json         content of `fedtune client status`
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fedtune.client.client_store import TEMPORARY, ClientStore
from fedtune.client.inference.model_versions import Versions
from fedtune.client.owner_bounds import DEFAULT_BOUNDS, Bounds
from fedtune.client.plan.eligibility import CAUTIOUS, DEFAULT_REQUIREMENTS, Consent, Requirements
from fedtune.core.errors import InputError, PeerError, PolicyError
from fedtune.core.host.private_files import (
    ServiceLock,
    check_private,
    private_folder,
    read_bounded,
    read_json,
    taking_turns,
    write_private,
)
from fedtune.core.manifest.fleet_log import MAX_LOG_BYTES, Fleet, extended, replay
from fedtune.core.manifest.joining import (
    MAX_REQUEST_BYTES,
    Invitation,
    JoinRequest,
    PrivateKeys,
    check_address,
    check_name,
)
from fedtune.core.secagg.identity import Identity
from fedtune.core.secagg.round_log import FileRoundLog
from fedtune.data.job_inputs import is_pack

ENVIRONMENT = "FEDTUNE_CLIENT_HOME"
KEPT_JOBS = 3
MODELS, PACKS = "models", "packs"
MANIFEST = "manifest.json"
REQUEST = "request.json"
_LOG = "fleet.jsonl"
_DEVICE = "device.json"
CALIBRATIONS = "calibration"
ROUNDS = "rounds"
_SERVICE_LOCK = "service.lock"


@dataclass(frozen=True)
class DeviceConfig:
    """The content of device.json.

    Args:
        bases: model directories of this device; a job's base is found among them by its digest.
        fleet_key: first public key of the fleet's owner, in hexadecimal digits.
        allow_clear: whether the device takes part in jobs that do not mask updates.
        scores: whether it evaluates for the server, which then sees each of the device's scores.
        requirements: conditions under which the device takes part.
        bounds: what it demands of cohorts, fleet and sums.
    """

    name: str
    server: str
    data: str
    bases: tuple[str, ...]
    fleet_key: str
    allow_clear: bool = False
    scores: bool = False
    requirements: Requirements = DEFAULT_REQUIREMENTS
    bounds: Bounds = DEFAULT_BOUNDS


def default_home() -> Path:
    """Returns the default folder of a device."""
    return Path(os.environ.get(ENVIRONMENT) or Path.home() / ".fedtune" / "client")


def where(path: Path) -> str:
    """Returns the option that names a device's folder in a command; empty for the default one."""
    return "" if path == default_home() else f" --home {path}"


class ClientHome:
    """An existing folder of a device.

    Raises:
        InputError: there is none, other users may enter it, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        check_device(path)
        self.path = path
        self.config = _read_config(path / _DEVICE)
        self._replayed: tuple[bytes, Fleet] | None = None

    @classmethod
    def join(
        cls,
        path: Path,
        invitation: Invitation,
        name: str,
        data: Path,
        bases: tuple[Path, ...] = (),
        consent: Consent = CAUTIOUS,
    ) -> ClientHome:
        """Creates a device's folder with keys of its own, which never leave it.

        Raises:
            InputError: the folder belongs to a device already, or the data file or a base model is missing.
        """
        if (path / _DEVICE).exists():
            raise InputError(
                f"{path}: there is a device here already; remove it with: fedtune client leave{where(path)}"
            )
        check_data(data)
        for base in bases:
            if not (is_pack(base) or (base / "config.json").is_file()):
                raise InputError(f"{base}: not a model directory, which has a config.json, and not an edge pack")
        private_folder(path)
        keys = PrivateKeys.generate()
        request = JoinRequest.make(name, keys)
        write_private(path / "authority.pem", invitation.authority)
        write_private(path / "node.key", keys.node)
        keys.identity.save(path / "identity.key")
        write_private(path / REQUEST, request.to_bytes())
        config = DeviceConfig(
            name=name,
            server=invitation.server,
            data=str(data.absolute()),
            bases=tuple(str(base.absolute()) for base in bases),
            fleet_key=invitation.fleet_key.hex(),
            allow_clear=consent.allow_clear,
            scores=consent.scores,
            requirements=consent.requirements,
            bounds=consent.bounds,
        )
        write_private(path / _DEVICE, json.dumps(asdict(config), indent=1) + "\n")  # last: makes it a device
        return cls(path)

    @property
    def authority(self) -> bytes:
        """The certificate authority, PEM."""
        return read_bounded(self.path / "authority.pem", "a certificate")

    @property
    def node_key(self) -> str:
        """The private key that signs requests, PEM."""
        path = self.path / "node.key"
        check_private(path)
        return read_bounded(path, "a key").decode("ascii", "replace")

    @property
    def identity(self) -> Identity:
        """The device's identity for secure aggregation."""
        return Identity.load(self.path / "identity.key")

    @property
    def round_log(self) -> FileRoundLog:
        """The log of what this folder's devices have served of the fleet's jobs."""
        return FileRoundLog(private_folder(self.path / ROUNDS) / f"{self.config.fleet_key}.json")

    @property
    def models(self) -> Versions:
        """The pulled models."""
        return Versions(self.path / MODELS)

    def packs(self, name: str) -> Versions:
        """The pulled edge packs of a base model.

        Args:
            name: name of the pack, under which the fleet's owner has released it.
        """
        return Versions(self.path / PACKS / name)

    @property
    def bases(self) -> list[Path]:
        """The base models that the device brings: those that its owner has named, and the pulled packs."""
        pulled = [self.packs(folder.name).current for folder in sorted((self.path / PACKS).glob("*"))]
        return [*map(Path, self.config.bases), *(path for path in pulled if path is not None)]

    @property
    def lock(self) -> ServiceLock:
        """The lock that the running device holds."""
        return service_lock(self.path)

    @property
    def request(self) -> JoinRequest | None:
        """The request to join that the owner has not approved yet; None for a device of the fleet.

        Raises:
            InputError: the file is damaged.
        """
        path = self.path / REQUEST
        if not path.exists():
            return None
        try:
            return JoinRequest.from_bytes(read_bounded(path, "the request to join", MAX_REQUEST_BYTES))
        except PeerError as error:
            raise InputError(f"{path}: {error}; leave and join again") from None

    @property
    def fleet(self) -> Fleet:
        """The fleet after the log that this device holds; replayed only when the file has changed.

        Raises:
            InputError: the log is damaged.
        """
        log = self._log
        if self._replayed is None or self._replayed[0] != log:
            try:
                self._replayed = log, replay(log, bytes.fromhex(self.config.fleet_key))
            except PeerError as error:
                raise InputError(f"{self.path / _LOG}: {error}; leave and join again") from None
        return self._replayed[1]

    def renew_fleet(self, log: bytes, now: float) -> tuple[Fleet, Fleet]:
        """Takes a log that continues the one that this device holds; a pull and the device's process take turns.

        Args:
            now: seconds since 1970.

        Returns:
            The fleet before and after.

        Raises:
            PeerError: the log is older or another, not signed by the owner, expired, or without this device's keys.
            PolicyError: the fleet has more devices than this device's owner allows.
        """
        with taking_turns(self.path / "fleet.lock"):
            held, before = self._log, self.fleet
            after = before if log == held else extended(held, log, bytes.fromhex(self.config.fleet_key))
            after.check_fresh(now)
            most = self.config.bounds.max_devices
            if most is not None and len(after.devices) > most:
                raise PolicyError(f"the fleet has {len(after.devices)} devices, more than max_devices = {most}")
            keys = after.devices.get(self.config.name)
            if keys is None or keys.identity != self.identity.public:
                raise PeerError("the fleet's log does not list this device with its key")
            if log != held:
                write_private(self.path / _LOG, log)
                self._replayed = log, after
                (self.path / REQUEST).unlink(missing_ok=True)
            return before, after

    def owner_key_after(self, log: bytes) -> bytes:
        """Takes a log as `renew_fleet` does, now, and returns the owner's public key that is in force after it."""
        return self.renew_fleet(log, time.time())[1].key

    @property
    def _log(self) -> bytes:
        path = self.path / _LOG
        return read_bounded(path, "the fleet's log", MAX_LOG_BYTES) if path.exists() else b""


def check_device(path: Path) -> None:
    """Checks that there is a device in a folder, whether or not this release can read it.

    Raises:
        InputError: there is none, or other users may enter the folder.
    """
    if not (path / _DEVICE).is_file():
        made_by = f"fedtune client join INVITATION --data FILE{where(path)}"
        raise InputError(f"{path}: there is no device here; make one with: {made_by}")
    check_private(path)


def service_lock(path: Path) -> ServiceLock:
    """Returns the lock that the running device of a folder holds."""
    return ServiceLock(path / _SERVICE_LOCK)


def remove_device(path: Path) -> bool:
    """Removes a device's keys and state, and returns whether logs of served rounds stay."""
    kept = path / ROUNDS
    if not (kept.is_dir() and any(kept.iterdir())):
        shutil.rmtree(path)
        return False
    for each in sorted(path.iterdir(), key=lambda each: each.name == _DEVICE):  # last: a device until all else is gone
        if each == kept:
            continue
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()
    return True


def check_data(path: Path) -> None:
    """Checks that the data file is readable and not empty; its records are checked when they are first used.

    Raises:
        InputError: the file is missing, empty, or not readable.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise InputError(f"{path}: the data file is empty")
    except OSError as error:
        raise InputError(f"{path}: cannot read the data file: {error.strerror}") from None


class JobMemory(ClientStore):
    """A device's state between rounds, separate for each job; only the last few jobs are kept.

    Args:
        folder: folder of all jobs.
    """

    def __init__(self, folder: Path) -> None:
        self._root = private_folder(folder)
        for left in self._root.rglob(f".*{TEMPORARY}"):  # left by a process that was killed
            left.unlink(missing_ok=True)
        newest = max(self._jobs(), key=lambda path: path.stat().st_mtime, default=self._root / "none")
        super().__init__(newest)

    @property
    def manifest(self) -> bytes:
        """The manifest with which the server registered the device for this job.

        Raises:
            PeerError: the device has not been registered for a job.
        """
        try:
            return (self._folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise PeerError("this device has not been registered for a job") from None

    def begin(self, digest: str, manifest: bytes) -> None:
        """Selects a job, new or known.

        Args:
            digest: digest of its terms.
        """
        self._folder = private_folder(self._root / digest[:24])
        write_private(self._folder / MANIFEST, manifest)
        os.utime(self._folder)
        for old in sorted(self._jobs(), key=lambda path: path.stat().st_mtime)[:-KEPT_JOBS]:
            shutil.rmtree(old, ignore_errors=True)

    def _jobs(self) -> list[Path]:
        return [path for path in self._root.iterdir() if path.is_dir()]


def _read_config(path: Path) -> DeviceConfig:
    content = read_json(path, "the device", 1 << 16)
    texts = ("name", "server", "data", "fleet_key")
    try:
        others = {"bases", "allow_clear", "scores", "requirements", "bounds"}
        if set(content) != {*texts, *others} or not all(isinstance(content[key], str) for key in texts):
            raise ValueError
        bases = tuple(map(str, content["bases"]))
        bytes.fromhex(content["fleet_key"])
        name, server = check_name(content["name"]), check_address(content["server"])
        allow_clear, scores = content["allow_clear"] is True, content["scores"] is True
        requirements = Requirements(**content["requirements"])
        data, fleet_key = content["data"], content["fleet_key"]
        return DeviceConfig(
            name=name,
            server=server,
            data=data,
            bases=bases,
            fleet_key=fleet_key,
            allow_clear=allow_clear,
            scores=scores,
            requirements=requirements,
            bounds=Bounds(**content["bounds"]),
        )
    except (TypeError, ValueError):
        raise InputError(f"{path}: damaged, or of another release; leave and join again") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
