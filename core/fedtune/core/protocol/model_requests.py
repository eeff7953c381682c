"""How a device pulls an exported model from its server: what it asks, what it is told, and how a request is signed.

    POST /v1/fleet/describe-model    DescribeModel -> ModelDescription
    POST /v1/fleet/read-model        ReadModel -> bytes of one file

Both go over the server's public TLS socket and carry the device's signature, with the key it was enrolled with. What
the device gets are files and nothing else: it names each by the manifest that it was told first, puts it only where
that manifest allows, and counts the model as there when every file has the SHA-256 that the manifest states.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from msgspec import Meta

from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import Payload
from fedtune.core.protocol.model_manifest import MAX_MANIFEST_BYTES
from fedtune.core.secagg.primitives import framed

DESCRIBE, READ = "/v1/fleet/describe-model", "/v1/fleet/read-model"
MAX_PIECE_BYTES = 4 << 20  # of a file, in one answer
MAX_REQUEST_BYTES = 16 << 10
MAX_DESCRIPTION_BYTES = MAX_MANIFEST_BYTES + 4096
MAX_CLOCK_ERROR = 60  # seconds between a request's time and the server's
DEVICE_HEADER, TIME_HEADER, SIGNATURE_HEADER = "fedtune-device", "fedtune-time", "fedtune-signature"
_MAX_HEADER = 256

_Job = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
_Format = Annotated[str, Meta(pattern=r"^(int4|int8|fp16|fp32)\Z")]
_Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class DescribeModel(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Which model is there?

    Args:
        job: a finished job's name; None for the one that finished last.
        format: None for the smallest that the job was exported in.
    """

    version: int
    job: _Job | None = None
    format: _Format | None = None


class ModelDescription(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """One exported model: `manifest` is its fedtune.json, byte for byte."""

    version: int
    job: _Job
    format: _Format
    manifest: Annotated[bytes, Meta(max_length=MAX_MANIFEST_BYTES)]


class ReadModel(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A piece of one of its files, please: `size` bytes from `offset`, or what is left of it.

    Args:
        manifest: SHA-256 of the manifest that the device was told; the server may have exported anew since.
        file: as the manifest names it.
    """

    version: int
    job: _Job
    format: _Format
    manifest: _Digest
    file: Annotated[str, Meta(min_length=1, max_length=4096)]
    offset: Annotated[int, Meta(ge=0, le=1 << 50)]
    size: Annotated[int, Meta(ge=1, le=MAX_PIECE_BYTES)]


def sign_request(key: ec.EllipticCurvePrivateKey, device: str, path: str, moment: int, body: bytes) -> dict[str, str]:
    """Returns the headers by which the server knows who asks.

    Args:
        key: the device's own.
        moment: seconds since 1970 by the server's clock.
    """
    signature = key.sign(_statement(device, path, moment, body), ec.ECDSA(hashes.SHA256()))
    return {DEVICE_HEADER: device, TIME_HEADER: str(moment), SIGNATURE_HEADER: b64encode(signature).decode()}


def check_request(headers: Mapping[str, str], keys: Mapping[str, bytes], path: str, now: float, body: bytes) -> str:
    """Who asks.

    Args:
        headers: by lower-case name.
        keys: of every enrolled device, PEM.

    Raises:
        PeerError: nobody who is enrolled signed this very request just now.
    """
    device, moment, signature = (headers.get(name, "") for name in (DEVICE_HEADER, TIME_HEADER, SIGNATURE_HEADER))
    if max(map(len, (device, moment, signature))) > _MAX_HEADER or not (moment.isascii() and moment.isdigit()):
        raise PeerError("the request is not signed")
    if abs(now - int(moment)) > MAX_CLOCK_ERROR:
        raise PeerError("the request was signed at another time")
    if device not in keys:
        raise PeerError("no such device is enrolled")
    key = load_pem_public_key(keys[device])
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError
        statement = _statement(device, path, int(moment), body)
        key.verify(b64decode(signature, validate=True), statement, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        raise PeerError("the request is not signed with this device's key") from None
    return device


def _statement(device: str, path: str, moment: int, body: bytes) -> bytes:
    return framed("model request", device.encode(), path.encode(), str(moment).encode(), body)
