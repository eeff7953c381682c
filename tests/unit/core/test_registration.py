"""A device's registration has only bounded values, and values out of bounds are refused."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import HEADER_BYTES, Base, decode, encode
from fedtune.core.protocol.registration import PROTOCOL_VERSION, RegistrationReply, check_plan, two_digits

BASE = Base("demo", "0" * 64, "nf4", 16, 32.0, ("all-linear",), 64)
REPLY = RegistrationReply(PROTOCOL_VERSION, "0.1", 3, 4, 8000, "", "", 16, "dequantized", 64, 120, 1.5)


def read(**changes: Any) -> RegistrationReply:
    reply = decode(encode(msgspec.structs.replace(REPLY, **changes)), RegistrationReply, HEADER_BYTES)
    check_plan(reply, BASE, "auto")
    return reply


def test_a_plan_reads_back_equal() -> None:
    assert read() == REPLY
    assert read(rank=4, weights="packed", sequence_length=32, sits_out="battery low").rank == 4


@pytest.mark.parametrize(
    "absurd",
    [
        {"rank": 0},
        {"rank": -4},
        {"rank": 1 << 40},
        {"weights": "none"},
        {"sequence_length": 0},
        {"sequence_length": 1 << 40},
        {"peak_mb": 0},
        {"peak_mb": 1 << 50},
        {"seconds": 0.0},
        {"seconds": -1.0},
        {"seconds": 1e9},
        {"seconds": math.inf},
        {"seconds": math.nan},
        {"sits_out": "x" * 201},
    ],
)
def test_what_is_out_of_bounds_is_not_read(absurd: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match="RegistrationReply"):
        read(**absurd)


def test_what_contradicts_the_job_or_the_machine_is_refused_with_all_that_is_wrong() -> None:
    with pytest.raises(PeerError, match="rank 17, and the job's is 16; sequences of 65 tokens, and the job's have 64"):
        read(rank=17, sequence_length=65)
    with pytest.raises(PeerError, match="8001 MB for training on a machine of 8000 MB"):
        read(peak_mb=8001)
    assert read(peak_mb=8001, accelerator="a GPU with memory of its own")
    with pytest.raises(PeerError, match="weights dequantized, and the job wants them packed"):
        check_plan(REPLY, BASE, "packed")


def test_two_digits_are_told() -> None:
    assert [two_digits(value) for value in (0.123, 1.26, 119.4, 1234.0)] == [0.12, 1.3, 120.0, 1200.0]
