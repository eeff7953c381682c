"""The terms of a job: the settings from which a device derives its work, the base model, and the digest of both.

    terms = JobTerms(with_learning_rate(job, layout), base)
    layout.initial(terms.seed)                  # all of a device's random streams follow from this seed

The digest names the job for devices, whatever a server calls it. A device serves every round of one digest once, so a
job that runs again on the same devices needs another `federation.run`. Other terms give other randomness: under another
digest no rounding, dither or order of examples is repeated, so that no two runs give a server the same update twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from fedtune.core.errors import FedtuneError, PeerError
from fedtune.core.job.job_file import job_of_table
from fedtune.core.job.settings import Job
from fedtune.core.protocol.messages import Base
from fedtune.core.seeds import derive_seed

ALL = ()
_DEFAULTS = dataclasses.asdict(Job())
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "model": ("quantization",),
    "adapter": ALL,
    "data": ("sequence_length", "holdout", "balance"),
    "training": ALL,
    "federation": ("run", "rounds", "clients_per_round", "deadline", "aggregation", "rebalance_every"),
    "compression": ALL,
    "secure_aggregation": ALL,
    "privacy": ALL,
}
"""Section of a job -> its keys that devices are bound to; the others concern the server alone."""


@dataclass(frozen=True)
class JobTerms:
    """The terms of a job.

    Args:
        job: the job, with its learning rate set; keys that are no terms may have any value.
        base: the base model and the adapter's layout on it. Its name is no part of the digest.
    """

    job: Job
    base: Base

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings that bind a device, section -> key -> value; keys without a value are left out."""
        sections = dataclasses.asdict(self.job)
        return {
            section: {
                key: value
                for key, value in sections[section].items()
                if value is not None and (keys == ALL or key in keys)
            }
            for section, keys in SETTINGS.items()
        }

    @property
    def described(self) -> dict[str, Any]:
        """The base's fields as JSON values."""
        return {**msgspec.structs.asdict(self.base), "target_modules": list(self.base.target_modules)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of base and settings as canonical JSON, in hexadecimal digits.

        Settings that have their default are left out, and sections without others, so that what a later release adds
        changes no digest.
        """
        base = {**self.described, "name": ""}
        chosen = {
            section: changed
            for section, values in self.settings.items()
            if (changed := {key: value for key, value in values.items() if value != _DEFAULTS[section].get(key)})
        }
        text = json.dumps({"settings": chosen, "base": base}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def seed(self) -> int:
        """The seed of all random streams that devices draw for this job."""
        return derive_seed(self.job.training.seed, "job", self.digest)

    @classmethod
    def read(cls, settings: object, base: object) -> JobTerms:
        """Reads terms from JSON values, as `settings` and the fields of `base`.

        Raises:
            PeerError: they are no terms of a job that this release permits.
        """
        try:
            if not isinstance(settings, dict) or set(settings) != set(SETTINGS):
                raise PeerError(f"a job's terms have the sections {', '.join(SETTINGS)}")
            for section, keys in SETTINGS.items():
                foreign = set(settings[section]) - set(keys) if keys != ALL else set()
                if foreign:
                    raise PeerError(f"{section}.{min(foreign)[:80]} is no term of a job")
            terms = cls(job_of_table(settings), _base(base))
            if terms.job.training.learning_rate is None:
                raise PeerError("a job's terms state the learning rate")
        except (msgspec.ValidationError, TypeError, ValueError, FedtuneError) as error:
            raise PeerError(f"the job's terms cannot be read: {error}") from None
        return terms


def _base(value: object) -> Base:
    fields = Base.__struct_fields__
    if not isinstance(value, dict) or set(value) != set(fields):
        raise PeerError(f"a base has the fields {', '.join(fields)}")
    return msgspec.convert(["Base", *(value[field] for field in fields)], Base)
