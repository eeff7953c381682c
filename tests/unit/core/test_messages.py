"""Payloads are read back as they were written, and anything else is refused."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import (
    PROTOCOL_VERSION,
    Base,
    Downlink,
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    decode,
    encode,
)

BASE = Base("demo", "0" * 64, "nf4", 16, 32.0, ("all-linear",), 256)
REPLY = TrainReply(round=3, examples=10, tokens=100, steps=20, loss=1.5, seconds=0.5, update=(b"\x00" * 8,))


def evaluate_request(**changes: object) -> EvaluateRequest:
    fields: dict[str, object] = {
        "version": PROTOCOL_VERSION,
        "job_seed": 0,
        "round": 1,
        "base": BASE,
        "holdout": 0.1,
        "adapter": Downlink("", "f" * 64, (b"", b"")),
    }
    return EvaluateRequest(**(fields | changes))  # type: ignore[arg-type]


def test_a_payload_reads_back_equal() -> None:
    assert decode(encode(REPLY), TrainReply) == REPLY
    assert decode(encode(evaluate_request()), EvaluateRequest) == evaluate_request()


def test_another_protocol_version_is_refused_with_advice() -> None:
    with pytest.raises(PeerError, match=r"protocol version 99; this side speaks 4\. Install the same fedtune"):
        decode(encode(evaluate_request(version=99)), EvaluateRequest)


def test_another_protocol_version_is_recognised_whatever_its_fields_are() -> None:
    for later in (["EvaluateRequest", 99], ["EvaluateRequest", 99, {"new": [1, 2]}, b"more"]):
        with pytest.raises(PeerError, match="protocol version 99; this side speaks"):
            decode(msgspec.msgpack.encode(later), EvaluateRequest)
    with pytest.raises(PeerError, match="at least"):
        decode(msgspec.msgpack.encode(["EvaluateRequest", PROTOCOL_VERSION]), EvaluateRequest)
    with pytest.raises(PeerError, match="EvaluateReply"):
        decode(msgspec.msgpack.encode(["EvaluateRequest", 99]), EvaluateReply)


def test_another_kind_of_payload_is_refused() -> None:
    with pytest.raises(PeerError, match="TrainReply"):
        decode(encode(EvaluateReply(1, 1, 1, 0.5, 0.5)), TrainReply)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_at_any_depth(value: float) -> None:
    with pytest.raises(PeerError):
        decode(encode(TrainReply(3, 10, 100, 20, value, 0.5, (b"",))), TrainReply)
    base = Base("demo", "0" * 64, "nf4", 16, value, ("all-linear",), 256)
    with pytest.raises(PeerError):
        decode(encode(evaluate_request(base=base)), EvaluateRequest)


@given(cut=st.integers(0, len(encode(REPLY)) - 1))
def test_a_truncated_payload_is_refused(cut: int) -> None:
    with pytest.raises(PeerError):
        decode(encode(REPLY)[:cut], TrainReply)


@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises(PeerError):
        decode(data, TrainReply)


def test_a_payload_over_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(PeerError, match="at most 10 are accepted"):
        decode(encode(REPLY), TrainReply, limit=10)
