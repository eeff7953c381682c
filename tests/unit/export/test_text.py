"""Tokens become text without broken characters and without a trace of a stop string."""

from __future__ import annotations

import pytest

from fedtune.client.inference.scheduler import TextStream


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def stream(text: str, *stop: str) -> tuple[str, bool, list[str]]:
    answer = TextStream(decode, stop)
    shown = []
    for byte in text.encode():
        shown.append(answer.push(byte))
        if answer.stopped:
            break
    shown.append(answer.finish())
    return "".join(shown), answer.stopped, shown


@pytest.mark.parametrize("text", ["", "plain", "ünïcödé 日本語 🙂", "ends in é"])
def test_all_text_comes_out_and_no_character_in_pieces(text: str) -> None:
    whole, stopped, shown = stream(text)
    assert whole == text
    assert not stopped
    assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("ee", "two"), "one "),
        ("aab aaac", ("aaac",), "aab "),
        ("one", ("never",), "one"),
        ("one neve", ("never",), "one neve"),
        ("日本語です", ("語",), "日本"),
    ],
)
def test_an_answer_ends_before_its_stop_string(text: str, stop: tuple[str, ...], expected: str) -> None:
    whole, stopped, shown = stream(text, *stop)
    assert whole == expected
    assert stopped == (expected != text)
    assert not any(end in "".join(shown[: index + 1]) for end in stop for index in range(len(shown)))


def test_broken_bytes_do_not_hold_back_what_follows() -> None:
    answer = TextStream(decode)
    shown = [answer.push(0xFF) for _ in range(100)]
    assert sum(map(bool, shown)) > 10
    assert "".join(shown) + answer.finish() == "\ufffd" * 100


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    answer = TextStream(decode)
    assert answer.push("é".encode()[0]) == ""
    assert answer.finish() == "\ufffd"
