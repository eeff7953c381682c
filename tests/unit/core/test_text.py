"""Untrusted text: NFC follows Unicode in bounded time, and shown text has no control characters."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.text import counted, nfc, one_line

LETTERS = ["a", "\u1e69", "\uac00", "\u1100", "\u1161", "\u304b", "\U0001d15e", "\ud800"]
MARKS = ["\u0301", "\u0316", "\u0323", "\u0327", "\u0338", "\u0344", "\u0f71", "\u0f73", "\u3099", "\U0001d165"]


def test_a_number_agrees_with_its_noun() -> None:
    assert [counted(number, "round") for number in (0, 1, 1200)] == ["0 rounds", "1 round", "1,200 rounds"]
    assert [counted(days, "day") for days in (1.0, 90.0, 0.5)] == ["1 day", "90 days", "0.5 days"]
    assert [counted(number, "entry", "entries") for number in (1, 2)] == ["1 entry", "2 entries"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(LETTERS + 10 * MARKS), max_size=200).map("".join))
def test_nfc_is_the_standards(text: str) -> None:
    assert nfc(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0f73", "\u0301\u0344\u0316"])
def test_a_letter_with_very_many_marks_takes_no_longer_than_other_text(marks: str) -> None:
    start = time.monotonic()
    nfc("a" + marks * 100_000)
    assert time.monotonic() - start < 10  # Python's own order takes a minute


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("memory ran out", "memory ran out"),
        ("größer als 3 µs, 温度", "größer als 3 µs, 温度"),
        ("two\n\tlines\r\n", "two lines"),
        ("\x1b[2J\x07\x9b1m", "\ufffd[2J\ufffd\ufffd1m"),
        ("\u202eesrever\ud800\0", "\ufffdesrever\ufffd\ufffd"),
    ],
)
def test_what_steers_a_terminal_is_replaced(text: str, shown: str) -> None:
    assert one_line(text) == shown
