"""The server's calls to an address that its operator has set: one POST of a JSON object for each event of a job.

    with Webhook("https://hooks.example.org/fedtune", "fleet.example.org:8443", board.problem) as hook:
        hook.tell("job finished", QueuedJob(...))

The address is the `webhook` of server.toml, and no key of a job: an author of jobs cannot make the server call anybody.
The calls happen in a thread of their own, so one that hangs or fails delays no round. Events hold names, numbers and
measures; neither keys nor anybody's data, and no reason of a failure, which may quote from a file.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from fedtune.core.round_records import RoundRecord
from fedtune.server.live.job_queue import QueuedJob
from fedtune.server.run_display import Silent

TIMEOUT_SECONDS = 5.0
MAX_WAITING = 100  # events that wait for a slow address; more are left out
_END_SECONDS = 1.0


class Webhook:
    """A sender of events; without an address it sends nothing.

    Args:
        url: http or https address, or "".
        server: the server's address for devices, which tells events of several servers apart.
        problem: told once when the address fails, and again only after it has worked in between.
        timeout: seconds for the connection and for each piece of the answer.
    """

    def __init__(self, url: str, server: str, problem: Callable[[str], None], timeout: float = TIMEOUT_SECONDS) -> None:
        self._url, self._server, self._problem, self._timeout = url, server, problem, timeout
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_WAITING)
        self._failing = threading.Event()
        self._thread = threading.Thread(target=self._send_all, daemon=True, name="webhook")

    def __enter__(self) -> Self:
        if self._url:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the events that still wait a moment."""
        if self._url:
            self._put(None)
            self._thread.join(_END_SECONDS)

    def tell(self, event: str, job: QueuedJob, **facts: object) -> None:
        """Sends an event soon; never waits."""
        if self._url:
            named = {"event": event, "server": self._server, "time": round(time.time(), 3)}
            self._put({**named, "job": job.name, "number": job.number, **facts})

    def _put(self, event: dict[str, Any] | None) -> None:
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._failed(f"{MAX_WAITING} events wait")

    def _send_all(self) -> None:
        with httpx.Client(timeout=self._timeout) as client:
            while (event := self._waiting.get()) is not None:
                try:
                    with client.stream("POST", self._url, json=event) as response:  # its body may be of any length
                        response.raise_for_status()
                except httpx.HTTPStatusError as error:
                    self._failed(f"it answers {error.response.status_code}")
                except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                    self._failed(type(error).__name__)
                else:
                    self._failing.clear()

    def _failed(self, reason: str) -> None:
        if not self._failing.is_set():
            self._failing.set()
            host = urlsplit(self._url).hostname  # its path and user are often secret
            more = "events are lost until it works again; its address is webhook in server.toml"
            self._problem(f"webhook at {host}: {reason}; {more}")


class JobEvents(Silent):
    """A display that sends the begin and the rounds of one job."""

    def __init__(self, hook: Webhook, job: QueuedJob) -> None:
        self._hook, self._job, self._rounds = hook, job, 0

    def begin(self, done: int, rounds: int, cohort: int, moved: int) -> None:
        """Sends that the job trains from here on, for the first time or after an interruption."""
        del cohort, moved
        self._rounds = rounds
        self._hook.tell("job started", self._job, rounds=rounds, rounds_done=done)

    def round(self, record: RoundRecord) -> None:
        """Sends a round's figures."""
        score = record.eval
        self._hook.tell(
            "round finished",
            self._job,
            round=record.round,
            rounds=self._rounds,
            seconds=round(record.seconds, 3),
            aborted=record.aborted is not None,
            asked=len(record.clients),
            answered=len(record.survivors),
            bytes_up=record.traffic.bytes_up,
            bytes_down=record.traffic.bytes_down,
            train_loss=record.train_loss,
            exact_match=score.exact_match if score else None,
            loss=score.loss if score else None,
        )
