"""Concurrent answers with fair scheduling: one thread generates one token for each stream in turn.

    scheduler = Scheduler(model, slots=16, queue=64)
    stream = scheduler.submit(ids, sampling, adapter, emit)     # emit(Piece) is called on the scheduler's thread
    stream.cancel()                                             # its slot is free before the next turn

A stream is waiting, then active, then over; the numbers of active and waiting streams are bounded. Long prompts are
read in pieces of `PREFILL_PIECE` tokens, one piece a turn, which bounds the delay of other streams.
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

_PATIENCE = 8  # tokens without a whole character after which bytes count as broken; a character has at most four
_INCOMPLETE = "\ufffd"  # written by decoders for a character whose last bytes are missing


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
        self._begin = 0  # start of the window that is decoded again for each token
        self._read = 0  # tokens before this one have become text
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token and returns the text that it completes."""
        self._ids.append(token)
        before = self._decode(self._ids[self._begin : self._read])
        window = self._decode(self._ids[self._begin :])
        waited = len(self._ids) - self._read
        if waited < _PATIENCE and (window.endswith(_INCOMPLETE) or len(window) <= len(before)):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._release(self._held + window[len(before) :])

    def finish(self) -> str:
        """Returns the remaining text once no token follows."""
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
    """Returns the length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


PREFILL_PIECE = 128
_LOG = logging.getLogger(__name__)


class BusyError(Exception):
    """All slots are taken and the queue is full."""


@dataclass(frozen=True)
class Piece:
    """An event of a stream.

    Args:
        text: text to show.
        tokens: number of tokens generated so far.
        finish: None while it goes on; "stop", "length", "error" or "cancelled" with its last piece.
    """

    text: str
    tokens: int
    finish: str | None = None


class Stream:
    """One answer in progress; other threads than the scheduler's may call only `cancel`."""

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
        """Marks the stream as no longer needed."""
        self._cancelled.set()

    def turn(self) -> None:
        """Reads one piece of the prompt, or generates one token."""
        try:
            if self._cancelled.is_set():
                self.end("cancelled")
            elif self._unread:
                self._read()
            else:
                self._generate()
        except Exception:  # onnxruntime may raise any exception; one stream's failure must not end the others
            _LOG.exception("a stream failed")
            self.end("error")

    def end(self, finish: str, text: str = "") -> None:
        """Ends the stream and releases its resources."""
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
        slots: number of active streams; each holds a cache of the length of its prompt and answer.
        queue: number of waiting streams.
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
        """True if streams make progress."""
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """The numbers of active and waiting streams."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def submit(
        self, ids: Sequence[int], sampling: Sampling, adapter: Adapter | None, emit: Callable[[Piece], None]
    ) -> Stream:
        """Queues a stream, which releases the adapter when it ends.

        Raises:
            BusyError: the stream was not queued, and the caller still holds the adapter.
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
        """Yields an answer piece by piece to a caller that waits for it; leaving the loop early cancels the stream.

        Raises:
            BusyError: as in `submit`.
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
        """Ends every stream after its current turn."""
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
            time.sleep(0)  # lets the thread that writes answers run

    def _drop_cancelled(self) -> None:
        """Removes cancelled streams from the queue."""
        for stream in [waiting for waiting in self._waiting if waiting._cancelled.is_set()]:
            self._waiting.remove(stream)
            stream.end("cancelled")
