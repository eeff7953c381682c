"""The release of an exported model or an edge pack: what a fleet's owner signs; devices install nothing else.

    release = ModelRelease.sign(key, 3, "first", {"int4": digest}, expires)       # the owner, who holds the export
    release = ModelRelease.read(data, fleet_key, now)                             # a device, when it pulls

Releases of one owner are numbered, and a device installs none below the last that it installed: a server can hold a
release back until it expires, and can neither write one nor bring an old one back. To return a fleet to an older model,
its owner releases that model again, under a new number. The packs of each base model are counted by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedtune.core.errors import PeerError
from fedtune.core.manifest.signed import Signed
from fedtune.core.protocol.model_manifest import FORMATS, PACK_FORMAT
from fedtune.core.protocol.model_requests import MAX_RELEASE_BYTES
from fedtune.core.secagg.identity import Identity

KIND = "model release"
DAYS = 90.0  # for which a release is valid unless its signer says otherwise
RELEASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_NUMBER = 1 << 53
_FIELDS = {"number", "name", "models", "expires"}


@dataclass(frozen=True)
class ModelRelease:
    """A signed release.

    Args:
        number: number of the release, which grows.
        name: name of the job whose model it is, or of a base model.
        models: format -> SHA-256 of the export's manifest, in hexadecimal digits.
        expires: seconds since 1970 after which no device installs it; a device that has it goes on using it.
        data: the signed statement as bytes.
    """

    number: int
    name: str
    models: Mapping[str, str]
    expires: float
    data: bytes

    @property
    def is_pack(self) -> bool:
        """True for the release of an edge pack."""
        return PACK_FORMAT in self.models

    @classmethod
    def sign(cls, key: Identity, number: int, name: str, models: Mapping[str, str], expires: float) -> ModelRelease:
        """Signs a release with the fleet key.

        Raises:
            PeerError: the name or a format is none that devices accept.
        """
        content = {"number": number, "name": name, "models": dict(models), "expires": expires}
        return cls.unchecked(Signed.sign(key, KIND, content).to_bytes())

    @classmethod
    def read(cls, data: bytes, fleet_key: bytes, now: float) -> ModelRelease:
        """Reads and checks a release.

        Args:
            fleet_key: public key of the fleet's owner that is in force.
            now: seconds since 1970.

        Raises:
            PeerError: it is not signed with this key, has expired, or is malformed.
        """
        Signed.read(data, KIND, MAX_RELEASE_BYTES).checked(fleet_key)
        release = cls.unchecked(data)
        if not now < release.expires:
            raise PeerError(
                f"release {release.number} of {release.name} has expired: the server holds a newer one back, or the "
                "owner has to release the model again with: fedtune fleet publish"
            )
        return release

    @classmethod
    def unchecked(cls, data: bytes) -> ModelRelease:
        """Reads a release without its signature, for a side that only passes it on or wrote it itself.

        Raises:
            PeerError: it is malformed.
        """
        content = Signed.read(data, KIND, MAX_RELEASE_BYTES).content
        if set(content) != _FIELDS:
            raise PeerError(f"a {KIND} has {', '.join(sorted(_FIELDS))}")
        number, name, models, expires = (content[field] for field in ("number", "name", "models", "expires"))
        if type(number) is not int or not 0 < number <= _MAX_NUMBER:
            raise PeerError(f"a {KIND} has a number from 1 to {_MAX_NUMBER}")
        if not isinstance(name, str) or not RELEASE_NAME.fullmatch(name):
            raise PeerError(f"a {KIND} has a name: 1 to 64 letters, digits, '.', '_' or '-', got {str(name)[:80]!r}")
        if not _are_models(models) or not isinstance(expires, int | float):
            forms = f"({', '.join(FORMATS)}, or {PACK_FORMAT} alone)"
            raise PeerError(f"a {KIND} has the digest of each format {forms}, and the time it expires")
        return cls(number, name, models, expires, data)


def _are_models(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and (value.keys() <= set(FORMATS) or value.keys() == {PACK_FORMAT})
        and all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in value.values())
    )
