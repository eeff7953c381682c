"""A release is what the fleet's owner has signed, whole, of this kind, and until it expires."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.errors import PeerError
from fedtune.core.manifest.model_release import KIND, ModelRelease
from fedtune.core.manifest.signed import Signed
from fedtune.core.protocol.model_requests import MAX_RELEASE_BYTES
from fedtune.core.secagg.identity import Identity

OWNER, OTHER = Identity(b"\x01" * 32), Identity(b"\x02" * 32)
NOW = 1_800_000_000.0
MODELS = {"int4": "0" * 64, "fp32": "1" * 64}
DATA = ModelRelease.sign(OWNER, 3, "first", MODELS, NOW + 10).data
GOOD = {"number": 3, "name": "first", "models": MODELS, "expires": NOW + 10}


def read(data: bytes = DATA, key: bytes = OWNER.public, now: float = NOW) -> ModelRelease:
    return ModelRelease.read(data, key, now)


def test_a_release_reads_back_as_it_was_signed() -> None:
    release = read()
    assert (release.number, release.name, release.models, release.expires) == (3, "first", MODELS, NOW + 10)
    assert release == ModelRelease.unchecked(DATA)


def test_another_owner_s_release_is_refused() -> None:
    with pytest.raises(PeerError, match="not signed with this fleet's key"):
        read(key=OTHER.public)


@pytest.mark.parametrize("now", [NOW + 10, NOW + 1e9, float("nan")])
def test_an_expired_release_is_refused(now: float) -> None:
    with pytest.raises(PeerError, match="release 3 of first has expired"):
        read(now=now)


def test_a_statement_of_another_kind_is_no_release_though_the_owner_signed_it() -> None:
    other = Signed.sign(OWNER, "job manifest", GOOD)
    with pytest.raises(PeerError, match="expected a model release, got 'job manifest'"):
        read(other.to_bytes())
    with pytest.raises(PeerError, match="not signed with this fleet's key"):
        read(Signed(KIND, GOOD, other.signature).to_bytes())


@given(st.data())
def test_no_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    changed = bytearray(DATA)
    changed[data.draw(st.integers(0, len(DATA) - 2))] ^= data.draw(st.integers(1, 255))
    try:
        release = read(bytes(changed))
    except PeerError:
        return
    assert json.loads(release.data)["content"] == GOOD  # another way to write the same JSON


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "a model release has expires, models, name, number"),
        (GOOD | {"job": "first"}, "a model release has expires, models, name, number"),
        (GOOD | {"number": 0}, "a number from 1"),
        (GOOD | {"number": True}, "a number from 1"),
        (GOOD | {"number": 3.0}, "a number from 1"),
        (GOOD | {"number": 1 << 60}, "a number from 1"),
        (GOOD | {"name": "../first"}, "1 to 64 letters"),
        (GOOD | {"name": "first\n"}, "1 to 64 letters"),
        (GOOD | {"name": 3}, "1 to 64 letters"),
        (GOOD | {"models": {}}, "the digest of each format"),
        (GOOD | {"models": ["int4"]}, "the digest of each format"),
        (GOOD | {"models": {"int3": "0" * 64}}, "the digest of each format"),
        (GOOD | {"models": {"int4": "0" * 63}}, "the digest of each format"),
        (GOOD | {"models": {"int4": 0}}, "the digest of each format"),
        (GOOD | {"expires": "later"}, "the time it expires"),
    ],
)
def test_signed_nonsense_is_refused_too(content: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PeerError, match=complaint):
        read(Signed.sign(OWNER, KIND, content).to_bytes())


def test_a_release_is_bounded_before_it_is_parsed() -> None:
    with pytest.raises(PeerError, match="at most 4096 bytes"):
        read(b"[" * (MAX_RELEASE_BYTES + 1))
