"""From tokens to text, one token at a time: whole characters only, and nothing of a stop string.

text = TextStream(decode, stop=("\\n",))
shown = text.push(token)        # "" while a character or a possible stop string is incomplete
if text.stopped: ...
rest = text.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_PATIENCE = 8  # tokens without a whole character after which bytes are taken for broken; a character has four at most
_INCOMPLETE = "\ufffd"  # what a decoder writes for the first bytes of a character whose last are still to come


class TextStream:
    """The text of one answer.

    Args:
        decode: token ids -> text.
        stop: strings before which the answer ends.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._begin = 0  # of the window that is decoded again for each token
        self._read = 0  # tokens before this one have become text
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token and returns what may be shown because of it."""
        self._ids.append(token)
        before = self._decode(self._ids[self._begin : self._read])
        window = self._decode(self._ids[self._begin :])
        waited = len(self._ids) - self._read
        if waited < _PATIENCE and (window.endswith(_INCOMPLETE) or len(window) <= len(before)):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._release(self._held + window[len(before) :])

    def finish(self) -> str:
        """Returns the text that is left to show when no token follows."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._begin : self._read])
        text = self._held + self._decode(self._ids[self._begin :])[len(before) :]
        self._begin = self._read = len(self._ids)
        shown = self._release(text)
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _release(self, text: str) -> str:
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        shown, self._held = text[: len(text) - kept], text[len(text) - kept :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
