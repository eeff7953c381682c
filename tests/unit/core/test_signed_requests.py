"""A device's signature covers the whole of one request, for some minutes."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedtune.core.errors import InputError
from fedtune.core.manifest.joining import load_node_key, make_node_key
from fedtune.core.protocol.signed_requests import (
    KEY_HEADER,
    MAX_AGE_SECONDS,
    MAX_AHEAD_SECONDS,
    SIGNATURE_HEADER,
    TIME_HEADER,
    is_signed,
    sign,
)

KEY, OTHER = load_node_key(make_node_key()), load_node_key(make_node_key())
NOW, PATH, BODY = 1_800_000_000.0, "/v1/device/take", b"body"


def checks(now: float = NOW, path: str = PATH, body: bytes = BODY, **changed: str) -> bool:
    names = {"key": KEY_HEADER, "time": TIME_HEADER, "signature": SIGNATURE_HEADER}
    headers = sign(KEY, PATH, NOW, BODY) | {names[name]: value for name, value in changed.items()}
    return is_signed({name.encode(): value.encode() for name, value in headers.items()}, path, body, now)


def test_a_request_is_signed_as_it_was_sent_and_in_no_other_form() -> None:
    other = sign(OTHER, PATH, NOW, BODY)
    assert checks()
    assert not checks(body=b"bodY")
    assert not checks(path="/v1/device/bring")
    assert not checks(key=other[KEY_HEADER])
    assert not checks(signature=other[SIGNATURE_HEADER])
    assert not checks(time=sign(KEY, PATH, NOW - 1, BODY)[TIME_HEADER])


@pytest.mark.parametrize(
    ("seconds", "good"),
    [(0, True), (MAX_AGE_SECONDS - 1, True), (MAX_AGE_SECONDS + 1, False), (-MAX_AHEAD_SECONDS - 1, False)],
)
def test_a_signature_is_good_for_some_minutes(seconds: float, good: bool) -> None:
    assert checks(NOW + seconds) == good


@pytest.mark.parametrize("garbage", ["", "9" * 300, "AAAA", "=", "0001-01-01T00:00:00", "2026-13-01"])
def test_garbage_in_a_header_is_no_signature(garbage: str) -> None:
    assert not checks(key=garbage)
    assert not checks(time=garbage)
    assert not checks(signature=garbage)
    assert not is_signed({}, PATH, BODY, NOW)


def test_keys_of_an_algorithm_that_nobody_knows_are_refused() -> None:
    of_curves = bytes.fromhex("2a8648ce3d0201")  # the identifier of elliptic-curve keys
    unknown = of_curves[:-1] + b"\x7f"
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    assert not checks(key=base64.b64encode(changed(public, of_curves, unknown).encode()).decode())
    with pytest.raises(InputError, match="the node key cannot be read"):
        load_node_key(changed(make_node_key(), of_curves, unknown))


def changed(pem: str, old: bytes, new: bytes) -> str:
    """Returns a PEM text whose content has other bytes in one place."""
    first, *lines, last = pem.splitlines()
    content = base64.b64decode("".join(lines))
    assert old in content
    return "\n".join([first, base64.b64encode(content.replace(old, new)).decode(), last, ""])
