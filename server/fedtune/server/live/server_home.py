"""The server's folder: configuration, keys, devices, jobs, runs. It is private, and enough to move a server.

server.toml             addresses and ports, for people to edit
authority.pem, .key     certificate authority
server.pem, .key        server certificate
fleet.pub               the owner's first public key; the server has no key that signs for the fleet
fleet.jsonl             the fleet's log: devices approved and revoked, as the owner signed it
requests/               devices that wait for the owner's approval
invitation.json         what a machine needs to join; nothing in it is secret
control.key             authenticates the server's own processes to each other; new at every start
jobs/                   waiting, finished, failed and cancelled jobs
runs/NAME/              run directories
logs/                   what the server said, and about each job
link.db                 messages in transit; new at every start
status.json             the data of `fedtune server status`
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import tomli_w
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedtune.core.errors import InputError
from fedtune.core.host.private_files import ServiceLock, check_private, private_folder, read_bounded, write_private
from fedtune.core.manifest.joining import Invitation, check_address, read_public
from fedtune.server.live.certificates import Certificate, days_left, make_authority, make_server_certificate

ENVIRONMENT = "FEDTUNE_SERVER_HOME"
_CONFIG = "server.toml"
_FLEET_KEY = "fleet.pub"
INVITATION = "invitation.json"
_Port = Annotated[int, Field(ge=0, le=65535)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class ServerConfig:
    """The settings in server.toml.

    Args:
        address: HOST:PORT for devices; behind a reverse proxy, the proxy's.
        listen: address of the interface to listen on.
        port: of the public interface.
        wait_seconds: how long a round waits for all enrolled devices before it begins with those that are there.
        webhook: http or https address that gets a POST for each event of a job, or "".
        longest_answer: seconds after which a device that has not answered is given up, where the job sets no deadline.
    """

    address: str
    listen: str = "0.0.0.0"
    port: _Port = 8443
    wait_seconds: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    longest_answer: Annotated[float, Field(gt=0, le=604_800)] = 3600.0
    webhook: str = ""


def default_home() -> Path:
    """Returns the default folder of the server."""
    return Path(os.environ.get(ENVIRONMENT) or Path.home() / ".fedtune" / "server")


class ServerHome:
    """The existing folder of a server.

    Raises:
        InputError: there is none, other users have access to it, or its configuration is wrong.
    """

    def __init__(self, path: Path) -> None:
        if not (path / _CONFIG).is_file():
            raise InputError(f"{path}: there is no server here; make one with: fedtune server init --address HOST:PORT")
        check_private(path)
        self.path = path
        self.config = _read_config(path / _CONFIG)

    @classmethod
    def create(cls, path: Path, config: ServerConfig, hosts: Sequence[str], fleet_key: bytes) -> ServerHome:
        """Makes a server's folder with all its keys.

        Args:
            fleet_key: first public key of the fleet's owner.
            hosts: further names and addresses for the certificate, beside the one for devices.

        Raises:
            InputError: the folder has a server already, or an address is invalid.
        """
        if (path / _CONFIG).exists():
            raise InputError(f"{path}: there is a server here already")
        host = check_address(config.address).rpartition(":")[0].strip("[]")
        authority = make_authority()
        server = make_server_certificate(authority, [host, *hosts])
        private_folder(path)
        _save(path, "authority", authority)
        _save(path, "server", server)
        write_private(path / _FLEET_KEY, fleet_key.hex() + "\n")
        invitation = Invitation(config.address, authority.certificate.decode(), fleet_key)
        write_private(path / INVITATION, invitation.to_bytes())
        for folder in ("jobs", "runs"):
            private_folder(path / folder)
        write_private(path / _CONFIG, tomli_w.dumps(asdict(config)))
        return cls(path)

    def renew(self, hosts: Sequence[str]) -> None:
        """Makes a new server certificate; devices accept it, since the authority stays the same."""
        host = self.config.address.rpartition(":")[0].strip("[]")
        _save(self.path, "server", make_server_certificate(self._load("authority"), [host, *hosts]))

    @property
    def authority(self) -> bytes:
        """The authority's certificate in PEM format."""
        return self._load("authority").certificate

    def certificate_days_left(self) -> float:
        """Returns the days until the server's certificate expires."""
        return min(days_left(self._load(name).certificate) for name in ("authority", "server"))

    @property
    def fleet_key(self) -> bytes:
        """The first public key of the fleet's owner.

        Raises:
            InputError: the file is damaged, or the folder is an earlier release's, whose server held the private key.
        """
        path = self.path / _FLEET_KEY
        if not path.exists():
            raise InputError(
                f"{self.path}: made by an earlier release, in which the server held the fleet's key and devices' keys. "
                "Make a new server and fleet, let every device join again, and keep runs/ of the old folder"
            )
        return read_public(path)

    @property
    def lock(self) -> ServiceLock:
        """The lock that the running server holds."""
        return ServiceLock(self.path / "service.lock")

    def _load(self, name: str) -> Certificate:
        certificate, key = self.path / f"{name}.pem", self.path / f"{name}.key"
        check_private(key)
        return Certificate(read_bounded(certificate, "a certificate"), read_bounded(key, "a key"))


def _save(path: Path, name: str, certificate: Certificate) -> None:
    write_private(path / f"{name}.key", certificate.key)
    write_private(path / f"{name}.pem", certificate.certificate)


def _read_config(path: Path) -> ServerConfig:
    try:
        values = tomllib.loads(read_bounded(path, "the configuration", 1 << 16).decode())
        config = TypeAdapter(ServerConfig).validate_json(json.dumps(values, default=str))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise InputError("\n".join(lines)) from None
    for name, check in (("address", check_address), ("webhook", _check_webhook)):
        try:
            check(getattr(config, name))
        except InputError as error:
            raise InputError(f"{path}: {name}: {error}") from None
    return config


def _check_webhook(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = not url or (parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0)
    except ValueError:
        valid = False
    if not valid:
        raise InputError('expected an address such as "https://hooks.example.org/fedtune", or ""')
    return url
