"""A device tells its owner what happens: in lines as it happens, and in status.json with the state it is in.

The state follows from what happens, by the table `TRANSITIONS`; the device's loop says what happened and no more.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedtune.core.host.clock import Clock
from fedtune.core.host.private_files import write_private
from fedtune.core.text import one_line

STATUS = "status.json"

State = Literal["starting", "connected", "working", "answering", "waiting", "stopped"]
Event = Literal["connects", "takes", "answers", "ends", "fails", "retries", "stops"]
Write = Callable[[Path, bytes | str], None]

TRANSITIONS: Mapping[tuple[State, Event], State] = {
    ("starting", "connects"): "connected",
    ("starting", "fails"): "waiting",
    ("starting", "stops"): "stopped",
    ("connected", "connects"): "connected",  # again, or after a call that had failed
    ("connected", "fails"): "waiting",
    ("connected", "takes"): "working",
    ("connected", "answers"): "answering",  # of a message that it cannot write down
    ("connected", "ends"): "connected",
    ("connected", "stops"): "stopped",
    ("working", "answers"): "answering",
    ("working", "ends"): "connected",  # nobody waits for the answer any more
    ("working", "fails"): "waiting",
    ("working", "stops"): "stopped",
    ("answering", "ends"): "connected",
    ("answering", "fails"): "waiting",
    ("answering", "stops"): "stopped",
    ("waiting", "connects"): "connected",
    ("waiting", "fails"): "waiting",
    ("waiting", "retries"): "answering",
    ("waiting", "stops"): "stopped",
}
"""(state, what happens) -> the state after it. A pair that is not here does not happen."""


@dataclass(frozen=True)
class Status:
    """status.json.

    Args:
        state: "waiting" is between two tries to reach the server.
        trying: how often in a row the server could not be reached.
        next_try: when it will be tried again, seconds since 1970.
        contact: when the server last answered, seconds since 1970.
        clock_error: seconds by which this device's clock is ahead of the server's, where it had to be corrected.
        sits_out: which of its owner's conditions kept the device from training when it was last asked, or "".
        plan: what it trains under, and what that took; None before the first job.
        problem: the last one, and when.
    """

    pid: int
    name: str
    server: str
    state: State = "starting"
    task: str = ""
    trying: int = 0
    next_try: float | None = None
    contact: float | None = None
    answered: int = 0
    clock_error: float = 0.0
    sits_out: str = ""
    plan: dict[str, Any] | None = None
    problem: str = ""
    problem_time: float | None = None
    written: float = 0.0


class DeviceReport:
    """The one way from a device's process to its owner; may be used from several threads.

    Args:
        folder: of the device.
        show: what people see, line by line.
        write: replaces a file's content.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        server: str,
        show: Callable[[str], None],
        clock: Clock,
        write: Write = write_private,
    ) -> None:
        self._path, self._show, self._clock, self._write = folder / STATUS, show, clock, write
        self._status = Status(os.getpid(), name, server)
        self._lock = threading.Lock()

    @property
    def status(self) -> Status:
        """The current status."""
        return self._status

    def happens(self, event: Event, **changes: Any) -> None:
        """Goes to the state that follows, and writes the status.

        Raises:
            ValueError: this cannot happen in the current state, which stays as it is.
        """
        after = TRANSITIONS.get((self._status.state, event))
        if after is None:
            raise ValueError(f"a device that is {self._status.state} never {event}")
        self.tell(state=after, **changes)

    def tell(self, **changes: Any) -> None:
        """Changes the status otherwise, and writes it."""
        with self._lock:
            self._status = replace(self._status, **changes, written=self._clock.now())
            with suppress(OSError):  # a full disk must not stop what can go on without it
                self._write(self._path, json.dumps(asdict(self._status), indent=1) + "\n")

    def show(self, text: str) -> None:
        """Shows a line, some of which the server may have written."""
        self._show(one_line(text))

    def problem(self, text: str) -> None:
        """Shows a problem and keeps it."""
        self.show(text)
        self.tell(problem=one_line(text)[:1000], problem_time=self._clock.now())
