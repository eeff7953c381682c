"""A device's signature over a whole request, path and body included; Flower's own covers its time alone.

    headers[BODY_SIGNATURE_HEADER] = sign_body(key, path, timestamp, body)          # on the device
    is_signed(shown_key, path, timestamp, body, signature)                          # on the server

So a proxy that ends TLS between the two can read requests, delay or drop them, but not change them or send its own.
"""

from __future__ import annotations

from base64 import b64decode, b64encode

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.supercore.primitives.asymmetric import sign_message, verify_signature

from fedtune.core.secagg.primitives import framed

BODY_SIGNATURE_HEADER = "fedtune-body-signature"


def sign_body(key: ec.EllipticCurvePrivateKey, path: str, timestamp: str, body: bytes) -> str:
    """Returns the value of the header, base64."""
    return b64encode(sign_message(key, _statement(path, timestamp.encode(), body))).decode("ascii")


def is_signed(shown_key: bytes, path: str, timestamp: bytes, body: bytes, signature: bytes) -> bool:
    """Returns whether the owner of a key has signed exactly this request.

    Args:
        shown_key: public key as requests carry it, PEM in base64.
        timestamp: value of Flower's header, which Flower checks.
        signature: value of BODY_SIGNATURE_HEADER.
    """
    try:
        key = load_pem_public_key(b64decode(shown_key, validate=True))
        told = b64decode(signature, validate=True)
    except ValueError:
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and verify_signature(key, _statement(path, timestamp, body), told)


def _statement(path: str, timestamp: bytes, body: bytes) -> bytes:
    return framed("fleet request", path.encode(), timestamp, body)
