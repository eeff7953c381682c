"""The resident server: it listens through a child process, does one job after the other, and survives its own death.

What lasts is on disk before it counts: devices, jobs and run directories. What Flower holds, messages on their way,
lasts as long as one child process; when that ends, or this process does, the round that was open begins anew from the
last checkpoint.

Threads: the main one works on jobs; the keeper looks after the child, devices and status once a second.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.core.enrolment import SignedRoster
from fedtune.core.errors import FedtuneError, InputError, PeerError, RunError
from fedtune.core.greeting import ACTION, PROTOCOL_VERSION, SITS_OUT, Greeting, GreetingReply, Terms, check_plan
from fedtune.core.job import DEFAULT_LOCAL_STEPS, Job, secure_cohort_problems
from fedtune.core.messages import HEADER_BYTES, Base, decode, encode
from fedtune.core.private import remove_unfinished, write_private
from fedtune.core.records import ClientRecord
from fedtune.model.lora import AdaptedModel
from fedtune.server.base import describe_base, open_model
from fedtune.server.display import Display
from fedtune.server.evaluator import ModelEvaluator
from fedtune.server.export.last_step import check_export, export_finished
from fedtune.server.live.board import STATUS, Board, DeviceState, JobStatus, PlanStatus
from fedtune.server.live.devices import Devices, changed
from fedtune.server.live.flower import Link, LinkLostError, NodeState, RunGrid
from fedtune.server.live.home import ServerHome
from fedtune.server.live.jobs import Jobs, QueuedJob
from fedtune.server.live.listener import CONTROL_KEY, OPEN, remove_passing
from fedtune.server.process import peak_rss_mb
from fedtune.server.run import FINISHED, Facts, run_rounds
from fedtune.server.run_directory import SUMMARY, RunDirectory, read_summary
from fedtune.strategies.envelope import seal, unseal
from fedtune.strategies.secure import SecureAggregation
from fedtune.strategies.selection import cohort_size
from fedtune.strategies.strategy import AdapterStrategy, federation_from_job

LOOPBACK = "127.0.0.1"
KEEPER_SECONDS = 1.0
POLL_SECONDS = 0.2
GREETING_SECONDS = 30.0
MAX_LEAST = 1000  # devices that a round may need
REFUSED_SECONDS = 60.0  # until a device that was refused is asked again
RETRY_SECONDS = (1.0, 60.0)  # after a failure of this machine: the first pause, and the longest
MOST_STUMBLES = 3  # over errors that nobody foresaw, before a job counts as failed
HEARTBEAT_PATIENCE_SECONDS = 30.0  # a device counts as online for as long as this after a heartbeat
_STOP_SECONDS = 5.0
_FOLLOW_SECONDS = 10.0
_BACKLOG = 1024


class Stopped(BaseException):
    """SIGTERM or Ctrl-C: raised wherever the main thread is, so that it ends at once."""


@dataclass(frozen=True)
class _CurrentJob:
    """What devices are told of the job."""

    id: str
    secure: bool
    terms: Terms


@dataclass(frozen=True)
class _LeftOut:
    """Why a device that is online is not asked to train, and since when: time.monotonic()."""

    state: DeviceState
    since: float


class Service:
    """One server's process.

    Args:
        home: whose lock this process holds.
        display: what people see.
    """

    def __init__(self, home: ServerHome, display: Display) -> None:
        self._home = home
        self._jobs = Jobs(home)
        for name in (CONTROL_KEY, STATUS):
            remove_unfinished(home.path, name)
        self._board = Board(home.path / STATUS, home.config.address, display)
        self._devices = Devices.load(home)
        self._devices_seen = -1
        self._job: _CurrentJob | None = None
        self._greeted: dict[int, int] = {}
        self._left_out: dict[int, _LeftOut] = {}
        self._model: tuple[Job, AdaptedModel] | None = None
        self._stumbles: Counter[str] = Counter()
        self._ending = threading.Event()
        self._registered = threading.Event()
        self._listener = Listener(home)
        self.tiers: dict[str, int] = {}
        """Device -> how many rank indices its plan trains, of those that the current job has greeted."""

    def run(self) -> None:
        """Serves until SIGTERM or Ctrl-C.

        Raises:
            InputError: the port is taken, or the certificate has expired.
        """
        if self._home.certificate_days_left() <= 0:
            raise InputError(
                f"{self._home.path}: the certificate has expired; make a new one with: fedtune server renew"
            )
        with _stopping(), self._listener:
            keeper = threading.Thread(target=self._keep, daemon=True, name="keeper")
            try:
                self._listen()
                keeper.start()
                listen, port = self._home.config.listen, self._listener.port
                self._board.note(f"serving devices on {listen}:{port}; they know it as {self._home.config.address}")
                self._serve()
            except Stopped:
                self._board.note("stopped; what finished is safe, and goes on when the server starts again")
            finally:
                self._ending.set()
                if keeper.ident is not None:
                    keeper.join(timeout=_STOP_SECONDS)

    # -- the main thread: jobs ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        pause, longest = RETRY_SECONDS
        while True:
            try:
                if not self._listener.alive:
                    self._board.problem("the listening process ended; starting it again")
                    self._listen()
                if waiting := self._jobs.waiting():
                    self._take(waiting[0])
                else:
                    time.sleep(POLL_SECONDS)
                pause = RETRY_SECONDS[0]
            except FedtuneError as error:
                self._board.problem(f"interrupted, and will go on: {error}")
                time.sleep(pause)
                pause = min(2 * pause, longest)

    def _take(self, job: QueuedJob) -> None:
        try:
            self._work(job)
        except InputError as error:
            self._board.problem(f"job {job.name} failed: {error}")
            self._jobs.fail(job, str(error))
        except LinkLostError:
            raise
        except RunError as error:
            if not (self._jobs.run_path(job) / SUMMARY).is_file():
                raise  # a full disk, say: it goes on when that is mended
            self._board.problem(f"job {job.name} failed: {error}")
            self._jobs.fail(job, str(error))
        except Exception as error:  # of torch or Flower, or a mistake of ours: one job's, and not the server's end
            traceback.print_exc()
            self._stumbles[job.name] += 1
            reason = f"{type(error).__name__}: {error}"
            if self._stumbles[job.name] < MOST_STUMBLES:
                raise RunError(reason) from error
            self._board.problem(f"job {job.name} failed, {MOST_STUMBLES} times: {reason}; the log has the traceback")
            self._jobs.fail(job, reason)
        finally:
            self._board.job = None

    def _work(self, queued: QueuedJob) -> None:
        """Takes a job from wherever it stands to its end."""
        job, path = queued.load(), self._jobs.run_path(queued)
        check_export(job)
        self._board.job = JobStatus(queued.name, "loading the base model", rounds=job.federation.rounds)
        if not _is_finished(path):
            self._train(queued, job, path)
        if job.export.formats:
            self._export(job, path)
        self._jobs.finish(queued)
        self._board.note(f"job {queued.name} finished: {path}")

    def _train(self, queued: QueuedJob, job: Job, path: Path) -> None:
        """All rounds that are missing."""
        model = self._open(job)
        base = describe_base(job, model.base.digest)
        directory = (
            RunDirectory.open(path) if (path / "job.toml").is_file() else RunDirectory.create(path, job, base.digest)
        )
        try:
            evaluator = ModelEvaluator(model, job.data)
            self._board.working(state="waiting for devices")
            self._greeted.clear()  # a greeting also says which job is next
            self._left_out.clear()
            self.tiers.clear()
            self._job = _CurrentJob(queued.path.stem, job.secure_aggregation.enabled, terms_of(job, base))
            with self._link.open_run(self._home.config.longest_answer) as grid:
                federation = federation_from_job(job, base, model.layout)
                identities = self._devices.roster.roster
                secure = SecureAggregation(self._job.id, identities) if job.secure_aggregation.enabled else None
                attendance = _Attendance(self, grid, job, set(identities.keys))
                strategy = AdapterStrategy(federation, attendance, self._observe, secure, self.tiers.__getitem__)
                run_rounds(strategy, directory, grid, evaluator, self._board, lambda: Facts(peak_rss_mb(), {}))
        finally:
            directory.close()

    def _export(self, job: Job, path: Path) -> None:
        """What the job's [export] asks for; killed in the middle of it, the server begins it anew."""
        self._board.working(state="exporting")
        self._model = None  # the export loads the base in another precision; there may not be room for both
        try:
            export_finished(job, path, read_summary(path), self._board)
        except FedtuneError as error:
            raise RunError(
                f"its adapter is finished, its export is not: {error}; try again with: fedtune export {path}"
            ) from error

    def _open(self, job: Job) -> AdaptedModel:
        if self._model is None or _model_settings(self._model[0]) != _model_settings(job):
            self._model = None  # free the old one before the new one is loaded
            self._model = (job, open_model(job))
        return self._model[1]

    def present(self, grid: Grid) -> dict[str, int]:
        """The devices that are online, speak this protocol, and hold the newest roster."""
        names = {key: name for name, key in self._devices.node_keys.items()}
        online = {
            names[node.public_key]: node.node_id
            for node in self._link.nodes()
            if node.online and node.public_key in names
        }
        newest = self._devices.roster
        ask = {
            name: node_id
            for name, node_id in online.items()
            if self._greeted.get(node_id, -1) < newest.version
            and (node_id not in self._left_out or time.monotonic() - self._left_out[node_id].since >= REFUSED_SECONDS)
        }
        self._greet(grid, ask, newest)
        return {name: node_id for name, node_id in online.items() if self._greeted.get(node_id, -1) >= newest.version}

    def _greet(self, grid: Grid, nodes: dict[str, int], roster: SignedRoster) -> None:
        job = self._job
        assert job is not None
        software = version("fedtune")
        greeting = seal(encode(Greeting(PROTOCOL_VERSION, software, job.id, job.secure, job.terms, roster.to_bytes())))
        messages = [Message(greeting, node_id, ACTION, group_id="greeting") for node_id in nodes.values()]
        names = {node_id: name for name, node_id in nodes.items()}
        for reply in grid.send_and_receive(messages, timeout=GREETING_SECONDS):
            node_id = reply.metadata.src_node_id
            name = names[node_id]
            try:
                answer = decode(unseal(reply), GreetingReply, limit=HEADER_BYTES)
                check_plan(answer, job.terms)
            except PeerError as error:
                self._left_out[node_id] = _LeftOut("refused", time.monotonic())
                self._board.device(name, state="refused", dropped=str(error)[:300])
                self._board.problem(f"device {name} is left out: {error}")
                continue
            hardware = f"{answer.cores} cores, {answer.memory_mb} MB"
            if answer.accelerator:
                hardware += f", {answer.accelerator}"
            plan = PlanStatus(answer.rank, answer.weights, answer.sequence_length, answer.peak_mb, answer.seconds)
            self._board.device(name, software=answer.software, hardware=hardware, plan=plan, state="online")
            if answer.sits_out:
                self._left_out[node_id] = _LeftOut("sits out", time.monotonic())
                self._board.device(name, state="sits out", dropped=f"{SITS_OUT}: {answer.sits_out}")
                continue
            self._greeted[node_id] = answer.roster_version
            self._left_out.pop(node_id, None)
            self.tiers[name] = answer.rank

    def _observe(self, record: ClientRecord) -> None:
        """Shows what became of a device in a round; one that sits out is greeted again before the next."""
        if record.dropped and SITS_OUT in record.dropped:
            nodes = {node.public_key: node.node_id for node in self._link.nodes()}
            self._greeted.pop(nodes.get(self._devices.node_keys.get(record.id, b""), 0), None)
        self._board.client(record)

    @property
    def wait_seconds(self) -> float:
        """How long the first round waits for everyone."""
        return self._home.config.wait_seconds

    def missing(self, text: str) -> None:
        """Says what a round waits for."""
        self._board.working(state=text)

    # -- the listening process, and what the keeper does --------------------------------------------------------------

    def _listen(self) -> None:
        self._registered.clear()
        key = self._listener.start()
        link = self._listener.link(key, self._board.problem)
        link.wait_until_ready()
        self._greeted.clear()
        self._left_out.clear()
        self._link = link
        self._register()
        self._listener.open()
        self._registered.set()

    def _keep(self) -> None:
        reported = ""
        while not self._ending.wait(KEEPER_SECONDS):
            try:
                self._board.write([job.name for job in self._jobs.waiting()])
                if self._registered.is_set() and self._listener.alive:
                    if changed(self._home) != self._devices_seen:
                        self._register()
                    self._link.refuse_foreign_runs()
                    self._show(self._link.nodes())
                reported = ""
            except Exception as error:  # the keeper outlives whatever it meets; the same thing is told once
                text = f"keeper: {error if isinstance(error, FedtuneError) else type(error).__name__}"
                if text != reported and not self._ending.is_set():
                    self._board.problem(text)
                reported = text

    def _register(self) -> None:
        """Makes what the SuperLink knows of devices equal to who is enrolled."""
        seen = changed(self._home)
        devices = Devices.load(self._home)
        wanted = {key: name for name, key in devices.node_keys.items()}
        known = {node.public_key: node.node_id for node in self._link.nodes()}
        for key, node_id in known.items():
            if key not in wanted:
                self._link.unregister(node_id)
        for key, name in wanted.items():
            if key not in known:
                self._link.register(name, key)
        self._devices, self._devices_seen = devices, seen
        self._board.keep_devices(set(devices.node_keys))
        for name in devices.node_keys:
            self._board.device(name)

    def _show(self, nodes: list[NodeState]) -> None:
        names = {key: name for name, key in self._devices.node_keys.items()}
        for node in nodes:
            name = names.get(node.public_key)
            if name is None or not node.ever_online:
                continue
            heard = (
                max(0.0, time.time() - node.online_until + HEARTBEAT_PATIENCE_SECONDS) if node.online_until else None
            )
            left_out = self._left_out.get(node.node_id)
            state = "offline" if not node.online else left_out.state if left_out else "online"
            self._board.device(name, state=state, last_heard=heard)


def terms_of(job: Job, base: Base) -> Terms:
    """What devices must know of a job to plan for it."""
    training, deadline = job.training, job.federation.deadline
    return Terms(
        base,
        training.batch_tokens,
        0 if training.local_epochs else training.local_steps or DEFAULT_LOCAL_STEPS,
        training.local_epochs or 0.0,
        training.weights,
        training.precision,
        training.gradient_checkpointing,
        0.0 if deadline == "auto" else deadline,
    )


class _Attendance:
    """Who takes part in a run, asked before every round: at first it waits for everyone, later for enough.

    Args:
        known: the devices that the others know; one that is enrolled while a job runs takes part in the next.
    """

    def __init__(self, service: Service, grid: RunGrid, job: Job, known: set[str]) -> None:
        self._service, self._grid, self._job, self._known = service, grid, job, known
        self._until = time.monotonic() + service.wait_seconds

    def __call__(self, grid: Grid) -> dict[str, int]:
        del grid  # it is the one this was made with
        while True:
            present = {name: node for name, node in self._service.present(self._grid).items() if name in self._known}
            everyone = len(present) == len(self._known) or time.monotonic() >= self._until
            if everyone and self._enough(len(present)):
                self._service.missing("training")
                return present
            least = next((count for count in range(len(present), MAX_LEAST) if self._enough(count)), MAX_LEAST)
            wanted = least if time.monotonic() >= self._until else max(least, len(self._known))
            self._service.missing(f"waiting for devices: {len(present)} of {wanted} are there")
            time.sleep(POLL_SECONDS)

    def _enough(self, present: int) -> bool:
        """Whether a round with so many devices can come to anything."""
        settings = self._job.federation
        if present < settings.minimum_clients:
            return False
        if not self._job.secure_aggregation.enabled:
            return True
        return not secure_cohort_problems(self._job, cohort_size(settings.clients_per_round, present))


class Listener:
    """The two sockets, and the child process that serves them. Use as a context manager."""

    def __init__(self, home: ServerHome) -> None:
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None
        self._public: socket.socket | None = None
        self._private: socket.socket | None = None

    def __enter__(self) -> Listener:
        self._public = self._bind_public()
        self._private = _bind(LOOPBACK, 0)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        for bound in (self._public, self._private):
            if bound is not None:
                bound.close()
        remove_passing(self._home.path)

    def _bind_public(self) -> socket.socket:
        """The public socket; the listening process of a server that was killed may take a moment to let go of it."""
        config = self._home.config
        end = time.monotonic() + _FOLLOW_SECONDS
        while (self._home.path / CONTROL_KEY).exists() and time.monotonic() < end:
            with suppress(InputError):
                return _bind(config.listen, config.port)
            time.sleep(POLL_SECONDS)
        return _bind(config.listen, config.port)

    @property
    def port(self) -> int:
        """Of the public socket."""
        assert self._public is not None
        return int(self._public.getsockname()[1])

    @property
    def private_port(self) -> int:
        """Of the private socket."""
        assert self._private is not None
        return int(self._private.getsockname()[1])

    def link(self, key: str, report: Callable[[str], None]) -> Link:
        """This process's line to the child that `start` began and gave the key for."""
        process = self._process
        return Link(
            f"{LOOPBACK}:{self.private_port}",
            self._home.authority,
            key,
            report,
            lambda: process is not None and process.poll() is None,
        )

    @property
    def alive(self) -> bool:
        """Whether the child process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Starts the child process, with a fresh database.

        Returns:
            The control key that its private socket wants to see.
        """
        assert self._public is not None
        assert self._private is not None
        self.stop()
        remove_passing(self._home.path)
        key = secrets.token_hex(32)
        write_private(self._home.path / CONTROL_KEY, key)
        handles = (self._public.fileno(), self._private.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedtune.server.live.listener", str(self._home.path), *map(str, handles)],
            stdin=subprocess.PIPE,  # closes when this process ends, however it does, and the child with it
            pass_fds=handles,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child in its own time
            umask=0o077,
        )
        return key

    def open(self) -> None:
        """Lets devices in, who were told to come back until now: the SuperLink knows them."""
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # it has just died, which is noticed elsewhere
            self._process.stdin.write(OPEN)
            self._process.stdin.flush()

    def stop(self) -> None:
        """Ends the child process."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise InputError(f"cannot listen on {host}:{port}: {reason}; change listen or port in server.toml") from None


def _is_finished(run: Path) -> bool:
    """Whether all rounds are done and everything about them is written."""
    return (run / SUMMARY).is_file() and read_summary(run)["status"] == FINISHED


def _model_settings(job: Job) -> tuple[object, ...]:
    return (job.model, job.adapter, job.training.weights, job.training.precision)


@contextmanager
def _stopping() -> Iterator[None]:
    """Raises Stopped in the main thread on SIGTERM and SIGINT; a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        raise Stopped

    before: dict[signal.Signals, Callable[..., object] | int | None] = {
        each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
