"""Many answers at once, fairly: one thread gives every stream one token in turn.

    scheduler = Scheduler(model, slots=16, queue=64)
    stream = scheduler.submit(ids, sampling, adapter, emit)     # emit(Piece) is called on the scheduler's thread
    stream.cancel()                                             # its slot is free before the next turn

A stream is waiting, then active, then over; a bounded number may be active and waiting. Long prompts are read in pieces
of `PREFILL_PIECE` tokens, one a turn, so that they hold nobody up for longer than that.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.client.inference.exported_model import Adapter, ExportedModel, Sampling, read

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


PREFILL_PIECE = 128
_LOG = logging.getLogger(__name__)


class BusyError(Exception):
    """All slots are taken and the queue is full."""


@dataclass(frozen=True)
class Piece:
    """Something that happened to a stream.

    Args:
        text: to be shown.
        tokens: how many have been generated so far.
        finish: None while it goes on; "stop", "length", "error" or "cancelled" with its last piece.
    """

    text: str
    tokens: int
    finish: str | None = None


class Stream:
    """One answer in the making; only the scheduler's thread touches more than `cancel`."""

    def __init__(
        self,
        model: ExportedModel,
        ids: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None,
        emit: Callable[[Piece], None],
    ) -> None:
        self._model, self._sampling, self._adapter, self._emit = model, sampling, adapter, emit
        self._unread = list(ids)
        self._prompt_tokens = len(ids)
        self._generator: Any = None
        self._text = TextStream(model.decode, sampling.stop)
        self._tokens = 0
        self._cancelled = threading.Event()
        self.over = False

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._cancelled.set()

    def turn(self) -> None:
        """One piece of the prompt, or one token."""
        try:
            if self._cancelled.is_set():
                self.end("cancelled")
            elif self._unread:
                self._read()
            else:
                self._generate()
        except Exception:  # onnxruntime raises what it likes; one stream's failure must not end the others
            _LOG.exception("a stream failed")
            self.end("error")

    def end(self, finish: str, text: str = "") -> None:
        """Gives back all it holds."""
        self._generator = None
        self.over = True
        self._model.release(self._adapter)
        self._emit(Piece(text, self._tokens, finish))

    def _read(self) -> None:
        if self._generator is None:
            self._generator = self._model.generator(self._prompt_tokens, self._sampling, self._adapter)
        read(self._generator, self._unread[:PREFILL_PIECE])
        del self._unread[:PREFILL_PIECE]

    def _generate(self) -> None:
        self._generator.generate_next_token()
        token = int(self._generator.get_next_tokens()[0])
        self._tokens += 1
        if token in self._model.end_tokens:
            self.end("stop", self._text.finish())
            return
        text = self._text.push(token)
        if self._text.stopped:
            self.end("stop", text)
        elif self._tokens >= self._sampling.max_tokens:
            rest = self._text.finish()
            self.end("stop" if self._text.stopped else "length", text + rest)
        elif text:
            self._emit(Piece(text, self._tokens))


class Scheduler:
    """Runs streams until it is closed.

    Args:
        slots: streams that are active at once; each holds a cache of its prompt's and answer's length.
        queue: streams that may wait for a slot.
    """

    def __init__(self, model: ExportedModel, slots: int = 16, queue: int = 64) -> None:
        self.model = model
        self._slots, self._queue = slots, queue
        self._waiting: deque[Stream] = deque()
        self._active: list[Stream] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether streams make progress."""
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """How many streams are active and how many wait."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def submit(
        self, ids: Sequence[int], sampling: Sampling, adapter: Adapter | None, emit: Callable[[Piece], None]
    ) -> Stream:
        """Queues a stream; from here on it releases the adapter itself.

        Raises:
            BusyError: nothing was queued, and the adapter is still the caller's.
        """
        stream = Stream(self.model, ids, sampling, adapter, emit)
        with self._changed:
            self._drop_cancelled()
            if self._closing or len(self._active) + len(self._waiting) >= self._slots + self._queue:
                raise BusyError
            self._waiting.append(stream)
            self._changed.notify()
        return stream

    def answer(self, ids: Sequence[int], sampling: Sampling, adapter: Adapter | None = None) -> Iterator[str]:
        """Yields an answer piece by piece to a caller that waits for it; leaving early cancels the stream.

        Raises:
            BusyError: as `submit`.
        """
        pieces: queue.Queue[Piece] = queue.Queue()
        stream = self.submit(ids, sampling, adapter, pieces.put)
        try:
            while (piece := pieces.get()).finish is None:
                yield piece.text
            yield piece.text
        finally:
            stream.cancel()

    def close(self, seconds: float = 5.0) -> None:
        """Ends every stream after its present turn."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._active or self._waiting or self._closing):
                    self._changed.wait()
                self._drop_cancelled()
                while self._waiting and len(self._active) < self._slots:
                    self._active.append(self._waiting.popleft())
                turns, closing = list(self._active), self._closing
                if closing:
                    turns += self._waiting
                    self._waiting.clear()
            for stream in turns:
                if closing:
                    stream.cancel()
                stream.turn()
            with self._changed:
                self._active = [stream for stream in self._active if not stream.over]
            if closing:
                return
            time.sleep(0)  # lets the thread that writes answers have its turn, too

    def _drop_cancelled(self) -> None:
        """Takes streams that wait and are wanted no more out of the queue at once."""
        for stream in [waiting for waiting in self._waiting if waiting._cancelled.is_set()]:
            self._waiting.remove(stream)
            stream.end("cancelled")
