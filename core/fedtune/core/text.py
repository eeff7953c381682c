"""Text for people: a number with its noun; and untrusted text, normalised to Unicode's NFC in bounded time and made
safe for a terminal, a log or a status file.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

_LONG_RUN = 32  # combining marks on one letter; Unicode's stream-safe format has at most 30


def nfc(text: str) -> str:
    """Returns `unicodedata.normalize("NFC", text)`, but not in quadratic time.

    The library sorts the combining marks of a letter by insertion: a megabyte of unsorted marks would take minutes.
    This function sorts long runs of marks first, as the first step of the standard sorts them.
    """
    if unicodedata.is_normalized("NFC", text):
        return text
    return unicodedata.normalize("NFC", _long_runs().sub(lambda run: _sorted(run[0]), text))


def one_line(text: str) -> str:
    """Returns the text on one line, with U+FFFD for characters that steer a terminal or change the text's direction."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text.split()))


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """Returns a number with its noun: "1 round", "1,200 rounds", "0.5 days".

    Args:
        plural: where it is not the noun with an s.
    """
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun if number == 1 else plural or noun + 's'}"


def _sorted(marks: str) -> str:
    return "".join(sorted("".join(map(_decomposed, marks)), key=unicodedata.combining))


def _decomposed(sign: str) -> str:
    return unicodedata.normalize("NFD", sign)


@cache
def _long_runs() -> re.Pattern[str]:
    marks = [sign for sign in map(chr, range(sys.maxunicode + 1)) if unicodedata.combining(_decomposed(sign)[0])]
    return re.compile(f"[{''.join(marks)}]{{{_LONG_RUN},}}")
