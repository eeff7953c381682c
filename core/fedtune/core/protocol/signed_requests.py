"""A device's signature over a whole request: its path, time and body.

    headers = sign(key, path, moment, body)                # on the device
    is_signed(headers, path, body, now)                    # on the server, for a key that is enrolled

So a proxy that ends TLS between the two can read requests, delay or drop them, but not change them or send its own.
"""

from __future__ import annotations

import datetime
from base64 import b64decode, b64encode
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from fedtune.core.secagg.primitives import framed

KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER = "fedtune-key", "fedtune-time", "fedtune-signature"
MAX_AGE_SECONDS, MAX_AHEAD_SECONDS = 305.0, 5.0  # a body may take minutes on a slow link
_ALGORITHM = ec.ECDSA(hashes.SHA256())


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Returns the public key, PEM."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def sign(key: ec.EllipticCurvePrivateKey, path: str, moment: float, body: bytes) -> dict[str, str]:
    """Returns the headers by which the server knows the device and its request.

    Args:
        moment: seconds since 1970 by the server's clock.
    """
    timestamp = datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat()
    signature = key.sign(_statement(path, timestamp.encode(), body), _ALGORITHM)
    return {
        KEY_HEADER: b64encode(public_pem(key)).decode("ascii"),
        TIME_HEADER: timestamp,
        SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
    }


def is_signed(headers: Mapping[bytes, bytes], path: str, body: bytes, now: float) -> bool:
    """Returns whether the owner of the key that a request shows has signed exactly this request, and lately.

    Args:
        headers: values by lower-case name.
        now: seconds since 1970.
    """
    shown, timestamp, signature = (
        headers.get(name.encode(), b"") for name in (KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER)
    )
    try:
        age = now - datetime.datetime.fromisoformat(timestamp.decode("ascii")).timestamp()
        key = load_pem_public_key(b64decode(shown, validate=True))
        if not -MAX_AHEAD_SECONDS < age < MAX_AGE_SECONDS or not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(b64decode(signature, validate=True), _statement(path, timestamp, body), _ALGORITHM)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, OverflowError):
        return False
    return True


def _statement(path: str, timestamp: bytes, body: bytes) -> bytes:
    return framed("fleet request", path.encode(), timestamp, body)
