"""The requests with which a device pulls an exported model or an edge pack from its server, and their answers.

    POST /v1/device/describe-release  DescribeModel -> ModelDescription
    POST /v1/device/read-model        ReadModel -> bytes of one file

Both carry the device's signature, as all calls of a fleet do. The device receives files only: it accepts the manifest
whose digest the fleet's owner has released, requests the files that the manifest lists, writes them only to the paths
that the manifest allows, and accepts the model when every file has the SHA-256 that the manifest states.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fedtune.core.protocol.messages import Payload
from fedtune.core.protocol.model_manifest import MAX_MANIFEST_BYTES

DESCRIBE, READ = "/v1/device/describe-release", "/v1/device/read-model"
MAX_PIECE_BYTES = 4 << 20  # bytes of a file in one answer
MAX_REQUEST_BYTES = 16 << 10
MAX_RELEASE_BYTES = 4096
MAX_FLEET_BYTES = 16 << 20
MAX_DESCRIPTION_BYTES = MAX_MANIFEST_BYTES + MAX_RELEASE_BYTES + MAX_FLEET_BYTES + 4096

_Job = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
_Format = Annotated[str, Meta(pattern=r"^(int4|int8|fp16|fp32|edge)\Z")]
_Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class DescribeModel(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A request for the description of an exported model.

    Args:
        job: name of a finished job, or of an edge pack; None for the one of the newest release.
        format: format of the export; None for the smallest that the job has.
    """

    version: int
    job: _Job | None = None
    format: _Format | None = None


class ModelDescription(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """One exported model, and what its release is checked by.

    Args:
        manifest: its fedtune.json, byte for byte.
        release: the owner's statement, as `ModelRelease` has it, which names the job.
        fleet: the fleet's log, from which the key follows that must have signed the release.
    """

    version: int
    format: _Format
    manifest: Annotated[bytes, Meta(max_length=MAX_MANIFEST_BYTES)]
    release: Annotated[bytes, Meta(max_length=MAX_RELEASE_BYTES)]
    fleet: Annotated[bytes, Meta(max_length=MAX_FLEET_BYTES)]


class ReadModel(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A request for a piece of one of a model's files: `size` bytes from `offset`, or the rest of the file.

    Args:
        manifest: SHA-256 of the manifest that the device received; the server may have a new export since.
        file: name of the file in the manifest.
    """

    version: int
    job: _Job
    format: _Format
    manifest: _Digest
    file: Annotated[str, Meta(min_length=1, max_length=4096)]
    offset: Annotated[int, Meta(ge=0, le=1 << 50)]
    size: Annotated[int, Meta(ge=1, le=MAX_PIECE_BYTES)]
