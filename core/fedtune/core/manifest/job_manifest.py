"""The job manifest: a job's terms as the fleet's owner has signed them, without which no live device trains.

    manifest = JobManifest.sign(key, "first", terms, expires)           # the owner, before a server gets the job
    manifest = JobManifest.read(data, fleet_key, now)                   # a device, at its registration

A server can hold a manifest back, or offer one that it has; it cannot write one. The name is for people alone: devices
know a job by the digest of its terms.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.core.errors import PeerError
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.manifest.signed import Signed
from fedtune.core.protocol.registration import MAX_MANIFEST_BYTES
from fedtune.core.secagg.identity import Identity

KIND = "job manifest"
DAYS = 90.0  # for which a manifest is valid unless its signer says otherwise
_MAX_NAME = 64
_FIELDS = {"name", "settings", "base", "expires"}


@dataclass(frozen=True)
class JobManifest:
    """A signed job.

    Args:
        name: name of the job, for people.
        terms: everything from which devices derive their work.
        expires: seconds since 1970 after which no device begins or continues the job.
        data: the signed statement as bytes.
    """

    name: str
    terms: JobTerms
    expires: float
    data: bytes

    @classmethod
    def sign(cls, key: Identity, name: str, terms: JobTerms, expires: float) -> JobManifest:
        """Signs a job with the fleet key."""
        content = {"name": name, "settings": terms.settings, "base": terms.described, "expires": expires}
        return cls(name, terms, expires, Signed.sign(key, KIND, content).to_bytes())

    @classmethod
    def read(cls, data: bytes, fleet_key: bytes, now: float) -> JobManifest:
        """Reads and checks a manifest.

        Args:
            fleet_key: public key of the fleet's owner.
            now: seconds since 1970.

        Raises:
            PeerError: it is not signed with this key, has expired, or holds no terms that this release permits.
        """
        Signed.read(data, KIND, MAX_MANIFEST_BYTES).checked(fleet_key)
        manifest = cls.unchecked(data)
        if not now < manifest.expires:
            raise PeerError(f"the manifest of job {manifest.name} has expired; its owner may sign it again")
        return manifest

    @classmethod
    def unchecked(cls, data: bytes) -> JobManifest:
        """Reads a manifest without its signature, for a side that only passes it on.

        Raises:
            PeerError: it holds no terms that this release permits.
        """
        content = Signed.read(data, KIND, MAX_MANIFEST_BYTES).content
        name, expires = content.get("name"), content.get("expires")
        if set(content) != _FIELDS or not isinstance(name, str) or not isinstance(expires, int | float):
            raise PeerError(f"a {KIND} has {', '.join(sorted(_FIELDS))}")
        if not 0 < len(name) <= _MAX_NAME:
            raise PeerError(f"a job's name has 1 to {_MAX_NAME} characters")
        return cls(name, JobTerms.read(content["settings"], content["base"]), expires, data)
