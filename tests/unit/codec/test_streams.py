"""Random streams match recorded values, so that a change by numpy or by the machine is noticed."""

from __future__ import annotations

import numpy as np

from fedtune.core.seeds import draw_signs, draw_uint16, draw_uint32, open_stream


def test_streams_give_known_answers() -> None:
    assert draw_uint32(open_stream(7, "selection"), 3).tolist() == [3588413543, 2919980880, 1890239546]
    assert draw_uint16(open_stream(7, "dither"), 5).tolist() == [51486, 37418, 25890, 31740, 43412]
    assert draw_signs(open_stream(7, "rotation"), 8).tolist() == [1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0]


def test_streams_of_different_purposes_and_seeds_are_unrelated() -> None:
    streams = [open_stream(seed, purpose) for seed in (1, 2) for purpose in ("rotation", "dither")]
    drawn = [tuple(draw_uint32(stream, 4).tolist()) for stream in streams]
    assert len(set(drawn)) == len(drawn)


def test_signs_are_balanced() -> None:
    signs = draw_signs(open_stream(0, "rotation"), 100_000)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.02
    assert signs.dtype == np.float32
