"""The status of a device for its owner: lines as events happen, and status.json with the current state.

The table `TRANSITIONS` maps a state and an event to the next state; the device's loop only reports events.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
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
    ("connected", "connects"): "connected",  # reconnects, or succeeds after a failed call
    ("connected", "fails"): "waiting",
    ("connected", "takes"): "working",
    ("connected", "answers"): "answering",  # refuses a message that it cannot write down
    ("connected", "ends"): "connected",
    ("connected", "stops"): "stopped",
    ("working", "answers"): "answering",
    ("working", "ends"): "connected",  # the server no longer waits for the answer
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
"""(state, event) -> next state. A pair that is missing cannot happen."""


@dataclass(frozen=True)
class Status:
    """The content of status.json.

    Args:
        state: "waiting" is between two tries to reach the server.
        trying: number of consecutive failures to reach the server.
        next_try: time of the next try, seconds since 1970.
        contact: time of the server's last answer, seconds since 1970.
        clock_error: seconds by which this device's clock is ahead of the server's, where it was corrected.
        sits_out: the owner's condition that kept the device from training when it was last asked, or "".
        plan: the current plan with its measurements; None before the first job.
        problem, problem_time: the last problem and its time.
        warning: the first pair of sums whose difference tells about few clients, or "".
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
    warning: str = ""
    written: float = 0.0


class DeviceReport:
    """Reports a device's events to its owner; may be used from several threads.

    Args:
        folder: the device's folder.
        show: prints a line to the owner.
        write: replaces a file's content.
        also: receive every status, too.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        server: str,
        show: Callable[[str], None],
        clock: Clock,
        write: Write = write_private,
        also: Sequence[Callable[[Status], None]] = (),
    ) -> None:
        self._path, self._show, self._clock, self._write = folder / STATUS, show, clock, write
        self._also = also
        self._status = Status(os.getpid(), name, server)
        self._lock = threading.Lock()

    @property
    def status(self) -> Status:
        """The current status."""
        return self._status

    def happens(self, event: Event, **changes: Any) -> None:
        """Moves to the next state, and writes the status.

        Raises:
            ValueError: the event cannot happen in the current state, which stays as it is.
        """
        after = TRANSITIONS.get((self._status.state, event))
        if after is None:
            raise ValueError(f"a device that is {self._status.state} never {event}")
        self.tell(state=after, **changes)

    def tell(self, **changes: Any) -> None:
        """Changes the status within its state, and writes it."""
        with self._lock:
            self._status = replace(self._status, **changes, written=self._clock.now())
            with suppress(OSError):  # a full disk must not stop the device
                self._write(self._path, json.dumps(asdict(self._status), indent=1) + "\n")
            for receive in self._also:
                receive(self._status)

    def show(self, text: str) -> None:
        """Shows a line, in which text from the server is made safe."""
        self._show(one_line(text))

    def problem(self, text: str) -> None:
        """Shows a problem and stores it in the status."""
        self.show(text)
        self.tell(problem=one_line(text)[:1000], problem_time=self._clock.now())
