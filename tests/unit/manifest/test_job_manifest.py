"""A manifest is what the fleet's owner has signed, whole, of this kind, and until it expires."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.errors import PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.manifest.job_manifest import KIND, JobManifest
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.manifest.signed import Signed
from fedtune.core.protocol.messages import Base
from fedtune.core.protocol.registration import MAX_MANIFEST_BYTES
from fedtune.core.secagg.identity import Identity

OWNER, OTHER = Identity(b"\x01" * 32), Identity(b"\x02" * 32)
BASE = Base("demo", "0" * 64, "nf4", 40, 32.0, ("all-linear",), 256, "core", "1" * 64)
TERMS = JobTerms(load_job(None, ["training.learning_rate=0.03"]), BASE)
NOW = 1_800_000_000.0
DATA = JobManifest.sign(OWNER, "first", TERMS, NOW + 10).data


def read(data: bytes = DATA, key: bytes = OWNER.public, now: float = NOW) -> JobManifest:
    return JobManifest.read(data, key, now)


def test_a_manifest_reads_back_as_it_was_signed() -> None:
    manifest = read()
    assert (manifest.name, manifest.terms.digest, manifest.terms.base) == ("first", TERMS.digest, BASE)
    assert manifest.data == DATA


def test_another_owner_s_manifest_is_refused() -> None:
    with pytest.raises(PeerError, match="not signed with this fleet's key"):
        read(key=OTHER.public)
    with pytest.raises(PeerError, match="not signed with this fleet's key"):
        read(JobManifest.sign(OTHER, "first", TERMS, NOW + 10).data)


@pytest.mark.parametrize("now", [NOW + 10, NOW + 1e9, float("nan")])
def test_an_expired_manifest_is_refused(now: float) -> None:
    with pytest.raises(PeerError, match="has expired; its owner may sign it again"):
        read(now=now)


def test_a_statement_of_another_kind_is_no_manifest_though_the_owner_signed_it() -> None:
    content = json.loads(DATA)["content"]
    other = Signed.sign(OWNER, "model manifest", content)
    with pytest.raises(PeerError, match="expected a job manifest, got 'model manifest'"):
        read(other.to_bytes())
    with pytest.raises(PeerError, match="not signed with this fleet's key"):
        read(Signed(KIND, content, other.signature).to_bytes())


@given(st.data())
def test_no_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(DATA) - 2))
    changed = bytearray(DATA)
    changed[place] ^= data.draw(st.integers(1, 255))
    try:
        manifest = read(bytes(changed))
    except PeerError:
        return
    assert manifest.terms == read().terms  # another way to write the same JSON, such as a capital hexadecimal digit


@given(st.binary(max_size=200))
def test_bytes_from_nowhere_are_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        read(data)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "a job manifest has base, expires, name, settings"),
        ({"name": "", "expires": NOW + 9, "settings": {}, "base": {}}, "1 to 64 characters"),
        ({"name": 3, "expires": NOW + 9, "settings": {}, "base": {}}, "a job manifest has"),
        ({"name": "a", "expires": "later", "settings": {}, "base": {}}, "a job manifest has"),
        ({"name": "a", "expires": NOW + 9, "settings": {}, "base": {}}, "the job's terms cannot be read"),
    ],
)
def test_signed_nonsense_is_refused_too(content: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PeerError, match=complaint):
        read(Signed.sign(OWNER, KIND, content).to_bytes())


def test_a_manifest_is_bounded_before_it_is_parsed() -> None:
    with pytest.raises(PeerError, match="at most 262144 bytes"):
        read(b"[" * (MAX_MANIFEST_BYTES + 1))
    with pytest.raises(PeerError, match="no signed JSON"):
        read(b"[" * 100_000)
