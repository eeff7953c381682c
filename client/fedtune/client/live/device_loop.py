"""The main loop of a device: it pulls messages from the server, has them handled, and uploads the answers.

    serve(home, planner, show)               # until SIGTERM or Ctrl-C

It opens no port, and recovers by itself from failures of the device and the network. The device writes a message down
before it fetches it, and removes the note once the server has the answer; a process that finds such a note reports an
interruption, so that no round waits for an answer that will not come.

Threads: the main one works; another sends heartbeats.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from fedtune.client.live.device_home import ClientHome
from fedtune.client.live.device_status import DeviceReport, Status, Write
from fedtune.client.live.fleet_link import Answer, FleetLink, note_of, recalled
from fedtune.client.live.joining_call import hand_in
from fedtune.client.live.registered_device import RegisteredDevice
from fedtune.client.live.signed_http import NotAdmittedError, RunOverError, UnknownDeviceError, UnreachableError
from fedtune.client.plan.device_plan import DevicePlanner
from fedtune.client.plan.planned_work import PlannedWork
from fedtune.core.errors import FedtuneError, InputError, PeerError
from fedtune.core.host.clock import SYSTEM_CLOCK, Backoff, Clock
from fedtune.core.host.private_files import remove_unfinished, write_private
from fedtune.core.host.process import Stopped, stopping
from fedtune.core.protocol.device_calls import Assignment
from fedtune.core.protocol.messages import Refusal, Request
from fedtune.core.text import one_line

POLL_SECONDS = (0.03, 0.4, 1.0)  # after activity, limit while a round is near, limit otherwise
POLL_GROWTH = 1.2
NEAR_SECONDS = 120.0  # a round counts as near until this long after the last message
BEAT_SECONDS = 8.0
BACKOFF_SECONDS = (0.5, 30.0)  # first and longest pause after a failure
ANSWER_SECONDS = 900.0  # limit for uploading an answer
STATUS_SECONDS = 1.0
ONLINE = "online"  # a file that is there while the server counts this device as online


class Work(Protocol):
    """Handles the server's messages; implemented by `RegisteredDevice`."""

    def answer(self, request: Request) -> bytes | Refusal:
        """Returns the payload, or a refusal."""

    def cannot_store(self, action: str, error: OSError) -> Refusal:
        """Returns the refusal of a message that could not be written down."""

    def sent(self, action: str, size: int, seconds: float) -> None:
        """Records the seconds that the upload of an answer took."""


def serve(
    home: ClientHome,
    planner: DevicePlanner,
    show: Callable[[str], None],
    also: Sequence[Callable[[Status], None]] = (),
) -> None:
    """Runs the device of a folder until SIGTERM or Ctrl-C.

    Args:
        home: the folder, whose lock this process holds.
        planner: plans for this device, and opens the models it trains.
        show: prints a line to the owner.
        also: receive every status of the device.
    """
    remove_unfinished(home.path)
    config = home.config
    report = DeviceReport(home.path, config.name, config.server, show, SYSTEM_CLOCK, also=also)
    planned = PlannedWork(tuple(home.bases), Path(config.data), planner)
    link = FleetLink(config.server, home.authority, home.node_key)
    ask = AskToJoin(home, report)
    DeviceLoop(home, link, RegisteredDevice(home, planned, report), report, ask_to_join=ask).run()


class AskToJoin:
    """Hands in a device's request to join until the server has taken it once, and tells the owner the code."""

    def __init__(self, home: ClientHome, report: DeviceReport) -> None:
        self._home, self._report = home, report
        self._taken = False

    def __call__(self) -> None:
        """Hands the request in, where there is one that no server has taken yet."""
        request = None if self._taken else self._home.request
        if request is None:
            return
        try:
            self._taken = hand_in(self._home.config.server, self._home.authority, request)
        except InputError as error:
            self._report.problem(str(error))
        if self._taken:
            self._report.show(f"not approved yet; code {request.code}: fedtune fleet approve {request.code}")


class DeviceLoop:
    """The process of a device.

    Args:
        home: the folder, whose lock this process holds.
        link: the device's link to its server, which is closed at the end.
        write: replaces a file's content.
        ask_to_join: hands in the request to join until the owner has approved it; called before every connection.
    """

    def __init__(
        self,
        home: ClientHome,
        link: FleetLink,
        work: Work,
        report: DeviceReport,
        clock: Clock = SYSTEM_CLOCK,
        write: Write = write_private,
        ask_to_join: Callable[[], None] = lambda: None,
    ) -> None:
        self._home, self._link, self._device_work, self._report = home, link, work, report
        self._ask_to_join = ask_to_join
        self._clock, self._write = clock, write
        self._backoff = Backoff(*BACKOFF_SECONDS)
        self._ending = threading.Event()
        self._counted_out = threading.Event()
        self._connected = False
        self._online = home.path / ONLINE

    def run(self) -> None:
        """Serves until SIGTERM or Ctrl-C."""
        beats = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        with stopping():
            try:
                _ = self._home.fleet  # reports damaged files now, not in a round
                beats.start()
                self._report.show(f"{self._home.config.name}: connecting to {self._home.config.server}")
                while True:
                    self._live()
            except Stopped:
                self._report.show("stopped")
            finally:
                self._ending.set()
                if self._connected:
                    self._link.leave()
                    self._online.unlink(missing_ok=True)
                self._link.close()
                self._report.happens("stops", task="")

    def _live(self) -> None:
        """Serves one connection until it is lost."""
        self._ask_to_join()
        try:
            self._connect()
            self._serve()
        except (UnknownDeviceError, NotAdmittedError, UnreachableError, PeerError) as error:
            self._pause(error)
        except RunOverError:
            pass

    def _connect(self) -> None:
        if not self._connected and self._online.exists():
            self._link.leave()  # after a crash the server still counts this device as online
        if not self._is_counted_in():
            self._link.connect()
        self._connected = True
        self._counted_out.clear()
        with suppress(OSError):  # needed only after a crash
            self._write(self._online, b"")
        self._backoff.reset()
        clock_error, status = self._link.clock_error, self._report.status
        if clock_error and clock_error != status.clock_error:
            self._report.show(f"this device's clock is {clock_error:+.0f} s off; using the server's")
        if status.state != "connected":
            self._report.show("connected")
        self._report.happens("connects", trying=0, next_try=None, contact=self._clock.now(), clock_error=clock_error)
        self._report_interruption()

    def _is_counted_in(self) -> bool:
        """Returns whether the server still counts this process as online; it would refuse to activate it then.

        A heartbeat also counts a device as online again that was away for too long.
        """
        try:
            return self._connected and self._link.beat()
        except UnknownDeviceError:
            return False

    def _serve(self) -> None:
        shortest, near, longest = POLL_SECONDS
        pause, last = shortest, self._clock.monotonic()
        while not self._counted_out.is_set():
            asked = self._clock.monotonic()
            task = self._link.take()
            took = self._clock.monotonic() - asked
            if self._backoff.failures:
                self._backoff.reset()
                self._report.happens("connects", trying=0, next_try=None)
            if task is not None:
                self._work(task)
                pause, last = shortest, self._clock.monotonic()
                continue
            self._clock.sleep(max(pause, took))  # spares a server that is slow to answer
            pause = min(pause * POLL_GROWTH, near if self._clock.monotonic() - last < NEAR_SECONDS else longest)
            if self._clock.now() - (self._report.status.contact or 0.0) > STATUS_SECONDS:
                self._report.tell(contact=self._clock.now())
        raise UnreachableError("the server no longer counts this device in")

    # -- one message --------------------------------------------------------------------------------------------------

    def _work(self, task: Assignment) -> None:
        kind = one_line(f"{task.action} {task.group}")[:200]
        note = self._home.path / "working"
        began = self._clock.monotonic()
        try:
            outcome = self._outcome(task, kind, note)
            self._bring(task, Answer(outcome, self._clock.monotonic() - began))
        except RunOverError:
            self._report.show(f"{kind}: the server no longer waits for it")
        except Stopped:
            with suppress(FedtuneError):
                self._link.answer(task, self._refusal("the device was stopped"))
            note.unlink(missing_ok=True)
            raise
        note.unlink(missing_ok=True)
        answered = self._report.status.answered + 1
        self._report.happens("ends", task="", answered=answered, contact=self._clock.now())

    def _outcome(self, task: Assignment, kind: str, note: Path) -> bytes | Refusal:
        """Writes the message down, fetches and handles it; the server hands each message out only once."""
        try:
            self._write(note, note_of(task))
            self._report.happens("takes", task=kind, contact=self._clock.now())
            return self._device_work.answer(self._link.fetch(task))
        except PeerError as error:
            return Refusal(str(error))
        except OSError as error:
            return self._device_work.cannot_store(task.action, error)

    def _bring(self, task: Assignment, answer: Answer) -> None:
        self._report.happens("answers")
        end = self._clock.monotonic() + ANSWER_SECONDS
        while True:
            start = self._clock.monotonic()
            try:
                self._link.answer(task, answer)
                self._backoff.reset()
                if isinstance(answer.outcome, bytes):
                    self._device_work.sent(task.action, len(answer.outcome), self._clock.monotonic() - start)
                return
            except UnknownDeviceError:
                raise RunOverError("the server has restarted") from None
            except UnreachableError as error:
                if self._clock.monotonic() > end:
                    raise
                self._pause(error)
                self._report.happens("retries")

    def _report_interruption(self) -> None:
        """Refuses a message that an earlier process took and never answered."""
        note = self._home.path / "working"
        if not note.exists():
            return
        try:
            task = recalled(note.read_bytes())
            self._link.answer(task, self._refusal("the device was interrupted while it worked on this"))
        except (RunOverError, PeerError, OSError):
            pass  # the server no longer waits for it
        note.unlink(missing_ok=True)

    def _refusal(self, reason: str) -> Answer:
        return Answer(Refusal(reason), 0.0)

    # -- heartbeats and pauses ----------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._ending.wait(BEAT_SECONDS * random.uniform(0.9, 1.0)):
            if not self._connected:
                continue
            try:
                if not self._link.beat():
                    self._counted_out.set()
            except UnknownDeviceError:
                self._counted_out.set()
            except FedtuneError:
                continue  # the main thread notices and reports it

    def _pause(self, error: FedtuneError) -> None:
        pause, problem = self._backoff.next(), one_line(str(error))
        if problem != self._report.status.problem or self._backoff.failures == 1:
            self._report.show(f"{error}; trying again")
        now = self._clock.now()
        self._report.happens(
            "fails", trying=self._backoff.failures, next_try=now + pause, problem=problem, problem_time=now
        )
        self._clock.sleep(pause)
