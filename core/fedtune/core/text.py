"""Words of the other side, before they come to a person's terminal, a log or a status file."""

from __future__ import annotations


def one_line(text: str) -> str:
    """The text on one line, without anything that steers a terminal or turns text around: U+FFFD takes its place."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text.split()))
