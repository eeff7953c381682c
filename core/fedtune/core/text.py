"""Text from elsewhere: in Unicode's NFC in bounded time, and fit for a person's terminal, a log or a status file."""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

_LONG_RUN = 32  # combining marks on one letter; Unicode's stream-safe format has at most 30


def nfc(text: str) -> str:
    """`unicodedata.normalize("NFC", text)`, which takes time in the square of how many marks one letter carries.

    It brings marks into the order of their classes by insertion: a megabyte of them out of order would hold everything
    up for minutes. Sorted beforehand, as the standard's first step sorts them, they take no longer than other text.
    """
    if unicodedata.is_normalized("NFC", text):
        return text
    return unicodedata.normalize("NFC", _long_runs().sub(lambda run: _sorted(run[0]), text))


def one_line(text: str) -> str:
    """The text on one line, without anything that steers a terminal or turns text around: U+FFFD takes its place."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text.split()))


def _sorted(marks: str) -> str:
    return "".join(sorted("".join(map(_decomposed, marks)), key=unicodedata.combining))


def _decomposed(sign: str) -> str:
    return unicodedata.normalize("NFD", sign)


@cache
def _long_runs() -> re.Pattern[str]:
    marks = [sign for sign in map(chr, range(sys.maxunicode + 1)) if unicodedata.combining(_decomposed(sign)[0])]
    return re.compile(f"[{''.join(marks)}]{{{_LONG_RUN},}}")
