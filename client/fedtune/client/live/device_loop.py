"""The one process of a device: it asks the server for work, does it with the base model it holds, and answers.

It opens no port, runs nothing but what is installed, and comes back by itself from whatever happens to it or the
network. A message is written down before it is taken from the server and crossed out when its answer is there; a
process that finds one written down says that it was interrupted, so that no round waits for what will never come.

Threads: the main one works; the heart beats in another.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]
from flwr.app import Message

from fedtune.client.device import Device
from fedtune.client.live.device_home import ClientHome, JobMemory
from fedtune.client.message_handlers import handle_in_the_clear, handle_under_secure_aggregation
from fedtune.client.plan.device_plan import DevicePlanner, Outcome
from fedtune.client.plan.eligibility import not_now
from fedtune.client.plan.machine import sense
from fedtune.client.plan.planned_work import PlannedWork
from fedtune.client.plan.planner import NoPlanError
from fedtune.client.secure_rounds import Credentials
from fedtune.core.errors import DataError, FedtuneError, InputError, ModelError, PeerError, UpdateError
from fedtune.core.host.private_files import remove_unfinished, write_private
from fedtune.core.host.stopping import Stopped, stopping
from fedtune.core.protocol.actions import EVALUATE, OPEN, TRAIN, query
from fedtune.core.protocol.enrolment import SignedRoster
from fedtune.core.protocol.payloads import decode, encode
from fedtune.core.protocol.registration import (
    ACTION,
    MAX_REGISTRATION_BYTES,
    PROTOCOL_VERSION,
    SITS_OUT,
    Registration,
    RegistrationReply,
    Terms,
    two_digits,
)
from fedtune.core.secagg import Policy
from fedtune.core.text import one_line
from fedtune.flower.envelope import request_of, seal, unseal
from fedtune.flower.fleet_link import (
    FleetLink,
    IncompatibleError,
    NotAdmittedError,
    RunOverError,
    Task,
    UnknownDeviceError,
    UnreachableError,
    error_reply,
    identify,
    interrupted,
)

POLL_SECONDS = (0.03, 0.4, 1.0)  # after activity, at most while a round is near, at most otherwise
POLL_GROWTH = 1.2
NEAR_SECONDS = 120.0  # a round counts as near for as long after the last message
BEAT_SECONDS = 8.0
BACKOFF_SECONDS = (0.5, 30.0)  # first and longest pause after a failure; a pause is between half of it and all of it
ANSWER_SECONDS = 900.0  # how long an answer is worth bringing
STATUS_SECONDS = 1.0
TELLING_BYTES = 50_000  # of an answer whose time tells the link's bandwidth

State = Literal["starting", "connected", "working", "answering", "waiting", "stopped"]


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


class Backoff:
    """Pauses that double up to a limit, with jitter, so that a fleet does not come back all at once."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        self._draw = draw
        self.failures = 0

    def next(self) -> float:
        """The pause after one more failure: between half and all of min(longest, first · 2^failures)."""
        first, longest = BACKOFF_SECONDS
        pause: float = min(longest, first * 2.0 ** min(self.failures, 16))
        self.failures += 1
        return pause * (0.5 + 0.5 * self._draw())

    def reset(self) -> None:
        """It worked."""
        self.failures = 0


class Service:
    """One device's process.

    Args:
        home: whose lock this process holds.
        planner: plans for this device, and opens the models it trains.
        show: what people see, line by line.
    """

    def __init__(self, home: ClientHome, planner: DevicePlanner, show: Callable[[str], None]) -> None:
        self._home, self._show_line = home, show
        remove_unfinished(home.path)
        config = home.config
        self._status = Status(os.getpid(), config.name, config.server)
        self._status_lock = threading.Lock()
        self._memory = JobMemory(home.path / "jobs")
        bases = tuple(map(Path, config.bases))
        self._planned = PlannedWork(bases, Path(config.data), planner)
        self._planned.uplink = self._uplink_before()
        self._make_apps()
        self._backoff = Backoff()
        self._ending = threading.Event()
        self._counted_out = threading.Event()
        self._link = FleetLink(config.server, home.authority, home.node_key)

    def run(self) -> None:
        """Serves until SIGTERM or Ctrl-C."""
        beats = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        with stopping():
            try:
                _ = self._home.roster  # damaged files are told now, not in a round
                beats.start()
                self._show(f"{self._home.config.name}: connecting to {self._home.config.server}")
                while True:
                    self._live()
            except Stopped:
                self._show("stopped")
            finally:
                self._ending.set()
                if self._link.node_id:
                    self._link.deactivate(self._link.node_id)
                    self._forget_node()
                self._link.close()
                self._tell(state="stopped", task="")

    def _live(self) -> None:
        """From one connection to its loss."""
        try:
            self._connect()
            self._serve()
        except (UnknownDeviceError, NotAdmittedError, UnreachableError, PeerError) as error:
            self._pause(error)
        except RunOverError:
            pass
        except IncompatibleError as error:
            self._backoff.failures = max(self._backoff.failures, 6)  # it takes a person
            self._pause(error)

    def _connect(self) -> None:
        before = self._node_before()
        if before and not self._link.node_id:
            self._link.deactivate(before)  # a crash left us counted as online; only our own folder says so
        if not self._is_counted_in():
            self._link.activate()
        self._counted_out.clear()
        with suppress(OSError):  # it is of use after a crash only
            write_private(self._home.path / "node", f"{self._link.node_id}\n")
        self._backoff.reset()
        if self._link.clock_error and self._link.clock_error != self._status.clock_error:
            self._show(f"this device's clock is {self._link.clock_error:+.0f} s off; going by the server's")
        if self._status.state != "connected":
            self._show("connected")
        self._tell(state="connected", trying=0, next_try=None, contact=time.time(), clock_error=self._link.clock_error)
        self._own_up()

    def _is_counted_in(self) -> bool:
        """Whether the server goes on with this process where the network left off; to activate would be refused then.

        A heartbeat also counts a device in again that was away for too long.
        """
        if not self._link.node_id:
            return False
        try:
            return self._link.beat()
        except UnknownDeviceError:
            return False

    def _serve(self) -> None:
        shortest, near, longest = POLL_SECONDS
        pause, last = shortest, time.monotonic()
        while not self._counted_out.is_set():
            asked = time.monotonic()
            task = self._link.pull()
            took = time.monotonic() - asked
            if self._backoff.failures:
                self._backoff.reset()
                self._tell(state="connected", trying=0, next_try=None)
            if task is not None:
                self._work(task)
                pause, last = shortest, time.monotonic()
                continue
            time.sleep(max(pause, took))  # a server that is slow to answer has enough to do
            pause = min(pause * POLL_GROWTH, near if time.monotonic() - last < NEAR_SECONDS else longest)
            if time.time() - (self._status.contact or 0.0) > STATUS_SECONDS:
                self._tell(contact=time.time())
        raise UnreachableError("the server no longer counts this device in")

    # -- one message --------------------------------------------------------------------------------------------------

    def _work(self, task: Task) -> None:
        head = task.head.metadata
        kind = one_line(f"{head.message_type} {head.group_id}")[:200]
        note = self._home.path / "working"
        identify(task.head, self._link.node_id)
        began = time.monotonic()
        try:
            try:
                write_private(note, task.proto)  # at once: the server has handed it out, and will not again
                self._tell(state="working", task=kind, contact=time.time())
                reply = self._reply(self._link.fetch(task))
            except PeerError as error:
                reply = error_reply(task.head, str(error))
            except OSError as error:
                reply = self._storage_failure(task.head, error)
            self._bring(reply, time.monotonic() - began)
        except RunOverError:
            self._show(f"{kind}: the server no longer waits for it")
        except Stopped:
            self._link_answer_quietly(error_reply(task.head, "the device was stopped"))
            note.unlink(missing_ok=True)
            raise
        note.unlink(missing_ok=True)
        self._tell(state="connected", task="", answered=self._status.answered + 1, contact=time.time())

    def _reply(self, message: Message) -> Message:
        """The answer of the installed app, or an error that says why there is none; never what the data says."""
        kind = message.metadata.message_type
        try:
            if kind == ACTION:
                return self._ask(message)
            if self._planned.terms is None:  # an earlier process was greeted
                self._take_on(decode(self._memory.terms, Terms))
            secure = self._memory.secure
            handler = self._secure_handler if secure else self._clear_handler
            if kind == (query(OPEN) if secure else TRAIN) and (condition := self._sits_out()):
                raise UpdateError(f"{SITS_OUT}: {condition}")
            if kind == EVALUATE and not self._home.config.scores:
                return error_reply(message, "this device scores nothing for a server; its owner may join with --scores")
            request, name = request_of(message), self._home.config.name
            if kind != TRAIN:
                return Message(seal(handler(name, request)), reply_to=message)
            with self._planned.watched():
                payload = handler(name, request)
            self._tell(plan=self._planned.to_json())
            self._show(f"trained for {self._planned.took.seconds or 0.0:.1f} s")
            return Message(seal(payload), reply_to=message)
        except (PeerError, UpdateError, NoPlanError) as error:
            problem, reason = str(error), str(error)
        except (ModelError, DataError, InputError) as error:
            problem, reason = str(error), f"{type(error).__name__}: the device's own status says more"
        except OSError as error:
            return self._storage_failure(message, error)
        except Exception as error:  # torch and Flower raise what they like; a message never ends the process
            cause = error.__cause__ or error
            problem, reason = f"{type(cause).__name__}: {cause}", f"{type(cause).__name__} on the device"
        self._problem(f"{kind}: {problem}")
        return error_reply(message, reason)

    def _storage_failure(self, request: Message, error: OSError) -> Message:
        self._problem(f"{request.metadata.message_type}: {error.strerror} ({error.filename or self._home.path})")
        return error_reply(request, f"the device cannot write or read its files: {error.strerror}")

    def _bring(self, reply: Message, seconds: float) -> None:
        self._tell(state="answering")
        end = time.monotonic() + ANSWER_SECONDS
        while True:
            start = time.monotonic()
            try:
                self._link.answer(reply, seconds)
                self._backoff.reset()
                self._time_link(reply, time.monotonic() - start)
                return
            except UnknownDeviceError:
                raise RunOverError("the server began anew") from None
            except UnreachableError as error:
                if time.monotonic() > end:
                    raise
                self._pause(error)
                self._tell(state="answering")

    def _time_link(self, reply: Message, seconds: float) -> None:
        """Remembers how fast an update went up; smaller answers say more of delay than of bandwidth."""
        if reply.has_error() or reply.metadata.message_type != TRAIN:
            return
        size = sum(record.count_bytes() for record in reply.content.array_records.values())
        if size >= TELLING_BYTES:
            self._planned.uplink = size / max(seconds, 1e-3)
            write_private(self._home.path / "uplink", f"{self._planned.uplink:.0f}\n")

    def _uplink_before(self) -> float | None:
        try:
            return float(max(1, int((self._home.path / "uplink").read_text())))
        except (OSError, ValueError):
            return None

    def _ask(self, message: Message) -> Message:
        registration = decode(unseal(message), Registration, limit=MAX_REGISTRATION_BYTES)
        self._home.renew_roster(SignedRoster.from_bytes(registration.roster))
        if not (registration.secure or self._home.config.allow_clear):
            raise UpdateError(
                "this device takes part in secure aggregation only; its owner may join with --allow-clear"
            )
        self._memory.begin(registration.job, registration.secure, encode(registration.terms))
        outcome = self._take_on(registration.terms)
        answer = RegistrationReply(
            PROTOCOL_VERSION,
            version("fedtune"),
            self._home.roster.version,
            os.cpu_count() or 0,
            psutil.virtual_memory().total >> 20,
            outcome.machine.gpus[0].name if outcome.machine.gpus else "",
            self._sits_out(),
            outcome.plan.tier,
            outcome.plan.choices.weights,
            outcome.plan.sequence_length,
            max(1, round(two_digits(outcome.plan.memory.peak / 1e6))),
            two_digits(outcome.seconds_per_round),
        )
        return Message(seal(encode(answer)), reply_to=message)

    def _take_on(self, terms: Terms) -> Outcome:
        """Plans for a job; what was open of another is over."""
        try:
            return self._planned.take_on(terms)
        finally:
            if self._planned.must_reload:
                self._make_apps()
            self._tell(plan=self._planned.to_json())

    def _make_apps(self) -> None:
        planned = self._planned
        device = Device(planned.open_trainer, planned.load_examples, self._memory, planned.share)
        self._secure_handler = handle_under_secure_aggregation(device, self._credentials)
        # Reached only where the owner allows it, see _ask.
        self._clear_handler = handle_in_the_clear(device)

    def _sits_out(self) -> str:
        """Which of its owner's conditions keeps the device from training now, or ""."""
        obstacle = not_now(sense(), self._home.config.requirements)
        self._tell(sits_out=obstacle.reading if obstacle else "")
        return obstacle.condition if obstacle else ""

    def _own_up(self) -> None:
        """Tells the server of a message that an earlier process took and never answered."""
        note = self._home.path / "working"
        if not note.exists():
            return
        try:
            request = interrupted(note.read_bytes())
            identify(request, request.metadata.dst_node_id)
            if request.metadata.dst_node_id == self._link.node_id:
                self._link.answer(error_reply(request, "the device was interrupted while it worked on this"), 0.0)
        except (RunOverError, PeerError, OSError):
            pass  # nobody waits for it any more
        note.unlink(missing_ok=True)

    def _link_answer_quietly(self, reply: Message) -> None:
        with suppress(FedtuneError):
            self._link.answer(reply, 0.0)

    def _credentials(self, client: str) -> Credentials:
        del client  # there is but one here
        home = self._home
        return Credentials(home.identity, home.roster.roster, Policy(), home.round_log)

    # -- the heart, and what is told ----------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._ending.wait(BEAT_SECONDS * random.uniform(0.9, 1.0)):
            if not self._link.node_id:
                continue
            try:
                if not self._link.beat():
                    self._counted_out.set()
            except UnknownDeviceError:
                self._counted_out.set()
            except FedtuneError:
                continue  # the main thread notices by itself, and says so

    def _pause(self, error: FedtuneError) -> None:
        pause = self._backoff.next()
        if one_line(str(error)) != self._status.problem or self._backoff.failures == 1:
            self._show(f"{error}; trying again")
        self._tell(
            state="waiting",
            trying=self._backoff.failures,
            next_try=time.time() + pause,
            problem=one_line(str(error)),
            problem_time=time.time(),
        )
        time.sleep(pause)

    def _show(self, text: str) -> None:
        self._show_line(one_line(text))  # some of it the server wrote

    def _problem(self, text: str) -> None:
        self._show(text)
        self._tell(problem=one_line(text)[:1000], problem_time=time.time())

    def _tell(self, **changes: Any) -> None:
        with self._status_lock:
            self._status = replace(self._status, **changes, written=time.time())
            with suppress(OSError):  # a full disk must not stop what can go on without it
                write_private(self._home.path / "status.json", json.dumps(asdict(self._status), indent=1) + "\n")

    def _node_before(self) -> int:
        try:
            return int((self._home.path / "node").read_text())
        except (OSError, ValueError):
            return 0

    def _forget_node(self) -> None:
        (self._home.path / "node").unlink(missing_ok=True)
