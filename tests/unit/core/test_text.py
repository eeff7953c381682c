"""Words of the other side are one line that steers nothing."""

from __future__ import annotations

import pytest

from fedtune.core.text import one_line


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
