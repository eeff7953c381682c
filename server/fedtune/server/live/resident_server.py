"""The resident server, which listens through a child process, runs one job after the other, and recovers from crashes.

Permanent state (devices, jobs, run directories) is on disk before it counts. Flower's state, messages in transit, lasts
as long as one child process; when that process or this one ends, the open round begins again from the last checkpoint.

The main thread works on jobs; the keeper thread looks after the child process, devices and status once a second.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from fedtune.core.errors import FedtuneError, InputError, PeerError, RunCancelledError, RunError
from fedtune.core.host.clock import SYSTEM_CLOCK, Backoff, Clock
from fedtune.core.host.private_files import remove_unfinished
from fedtune.core.host.process import Stopped, peak_rss_mb, stopping
from fedtune.core.job.learning_rates import with_learning_rate
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.flower.strategy import AdapterStrategy
from fedtune.flower.superlink import NodeState
from fedtune.model.adapted_model import AdaptedModel
from fedtune.server.evaluation import HeldOut, HeldOutEvaluator, in_this_process
from fedtune.server.export.request import check_export, export_finished
from fedtune.server.job_model import describe_base, open_model
from fedtune.server.live.cancellable_grid import CancellableGrid
from fedtune.server.live.enrolled_devices import Devices, changed
from fedtune.server.live.job_desk import Ending, JobDesk
from fedtune.server.live.job_queue import FAILED, Jobs, QueuedJob
from fedtune.server.live.listener import CONTROL_KEY
from fedtune.server.live.log_files import job_log, logged, server_log
from fedtune.server.live.registrar import ClientManager, Registrar
from fedtune.server.live.server_home import ServerHome
from fedtune.server.live.sockets import Listener
from fedtune.server.live.status_board import STATUS, Board, JobStatus
from fedtune.server.live.webhook import JobEvents, Webhook
from fedtune.server.run_directory import RunDirectory, is_finished, read_summary
from fedtune.server.run_display import Display, Several
from fedtune.server.run_rounds import Facts, close_run, run_rounds
from fedtune.server.tracking.tracker_libraries import check_installed
from fedtune.strategies.assembly import Clients, Parts, assemble
from fedtune.strategies.secure_sum import SecureAggregation

KEEPER_SECONDS = 1.0
POLL_SECONDS = 0.2
RETRY_SECONDS = (1.0, 60.0)  # after a failure of this machine: the first pause and the longest
HEARTBEAT_PATIENCE_SECONDS = 30.0  # how long a device counts as online after a heartbeat
_STOP_SECONDS = 5.0


class Service:
    """One server's process.

    Args:
        home: the server's folder, whose lock this process holds.
        displays: told of the jobs' events, for people and programs.
        clock: the main thread's clock.
    """

    def __init__(self, home: ServerHome, displays: Sequence[Display], clock: Clock = SYSTEM_CLOCK) -> None:
        self._home, self._clock = home, clock
        self.jobs = Jobs(home)
        for name in (CONTROL_KEY, STATUS):
            remove_unfinished(home.path, name)
        self.display = Several(*displays)
        self.board = Board(home.path / STATUS, home.config.address, self.display)
        self.board.remember()
        self._hook = Webhook(home.config.webhook, home.config.address, self.board.problem)
        self._devices = Devices.load(home)
        self._devices_seen = -1
        self._registrar = Registrar(self.board, lambda: self._link.nodes(), lambda: self._devices)
        self._model: tuple[Job, AdaptedModel] | None = None
        self._desk = JobDesk(self.jobs, self._work, self._ended)
        self._ending = threading.Event()
        self._registered = threading.Event()
        self._listener = Listener(home)

    def run(self) -> None:
        """Serves until SIGTERM or Ctrl-C.

        Raises:
            InputError: the port is taken, or the certificate has expired.
        """
        if self._home.certificate_days_left() <= 0:
            raise InputError(
                f"{self._home.path}: the certificate has expired; make a new one with: fedtune server renew"
            )
        log = logged(server_log(self._home))
        with stopping(), self._hook, log as written, self.display.also(written), self._listener:
            keeper = threading.Thread(target=self._keep, daemon=True, name="keeper")
            try:
                self._listen()
                keeper.start()
                listen, port = self._home.config.listen, self._listener.port
                self.board.note(
                    f"serving devices on {listen}:{port}; its address for them is {self._home.config.address}"
                )
                self._serve()
            except Stopped:
                self.board.note("stopped; what finished is safe, and goes on when the server starts again")
            finally:
                self._ending.set()
                if keeper.ident is not None:
                    keeper.join(timeout=_STOP_SECONDS)

    # -- the main thread: jobs ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        backoff = Backoff(*RETRY_SECONDS, draw=lambda: 1.0)
        while True:
            try:
                if not self._listener.alive:
                    self.board.problem("the listening process ended; starting it again")
                    self._listen()
                if job := self.jobs.next():
                    self._take(job)
                else:
                    self._clock.sleep(POLL_SECONDS)
                backoff.reset()
            except FedtuneError as error:
                self.board.problem(f"interrupted, and will go on: {error}")
                self._clock.sleep(backoff.next())

    def _take(self, job: QueuedJob) -> None:
        log, events = logged(job_log(self._home, job)), JobEvents(self._hook, job)
        with log as written, self.display.also(written), self.display.also(events):
            try:
                self._desk.take(job)
            finally:
                self.board.job = None

    def _work(self, queued: QueuedJob) -> None:
        """Begins or resumes a job, and runs it to its end."""
        job, path = queued.load(), self.jobs.run_path(queued)
        check_export(job)
        check_installed(job.tracking.to)
        self.board.job = JobStatus(queued.name, "loading the base model", rounds=job.federation.rounds)
        if not is_finished(path):
            self._train(queued, job, path)
        _check_wanted(queued)
        if job.export.formats:
            self._export(job, path)

    def _ended(self, ending: Ending) -> None:
        tell = self.board.problem if ending.state == FAILED else self.board.note
        tell(ending.text)
        self._hook.tell(f"job {ending.state}", ending.job)

    def _train(self, queued: QueuedJob, job: Job, path: Path) -> None:
        """Runs all remaining rounds."""
        model = self._open(job)
        manifest = self._manifest(queued, JobTerms(with_learning_rate(job, model.layout), describe_base(job, model)))
        base = manifest.terms.base
        if (path / "job.toml").is_file():
            directory = RunDirectory.open(path)
        else:
            directory = RunDirectory.create(path, with_learning_rate(job, model.layout), base.digest)
        try:
            job = directory.job()
            self.board.resumed(directory.rounds())
            evaluator = HeldOutEvaluator(HeldOut(model, job), in_this_process(model))
            self.board.working(state="waiting for devices")
            self._registrar.begin(manifest)
            with self._link.open_run(self._home.config.longest_answer) as run:
                identities, registrar = self._devices.fleet.roster, self._registrar
                clients = Clients(len(identities.keys), registrar.tiers.__getitem__, registrar.seconds)
                secure = SecureAggregation(identities) if job.secure_aggregation.enabled else None
                federation = assemble(
                    job, base, model.layout, clients, secure=secure, parts=Parts(trackers=[self.board])
                )
                grid = CancellableGrid(run, lambda: _check_wanted(queued))
                client_manager = ClientManager(
                    grid, self._registrar, job, set(identities.keys), self._home.config.wait_seconds
                )
                strategy = AdapterStrategy(federation, client_manager, bound_replies=run.bound_replies)
                try:
                    run_rounds(strategy, directory, grid, evaluator, self.board, _facts)
                except RunCancelledError:
                    self.board.working(state="closing the cancelled run")
                    close_run(federation, directory, evaluator, self.board, _facts())
                    raise
        finally:
            directory.close()

    def _manifest(self, queued: QueuedJob, terms: JobTerms) -> JobManifest:
        """Returns the job's manifest.

        Raises:
            InputError: it is not the job's, or devices would refuse it.
        """
        try:
            manifest = JobManifest.read(queued.manifest(), self._devices.fleet.key, self._clock.now())
        except PeerError as error:
            raise InputError(f"{queued.name}: {error}") from None
        if manifest.terms.digest != terms.digest:
            ours, signed = terms.settings, manifest.terms.settings
            keys = [
                f"{section}.{key}"
                for section, values in ours.items()
                for key in sorted({*values, *signed[section]})
                if values.get(key) != signed[section].get(key)
            ]
            raise InputError(f"{queued.name}: the signed manifest is not this job's: {', '.join(keys) or 'the base'}")
        return manifest

    def _export(self, job: Job, path: Path) -> None:
        """Exports the formats of the job's [export]; a server that is killed meanwhile begins the export again."""
        self.board.working(state="exporting")
        self._model = None  # the export loads the base in another precision; memory may not hold both
        try:
            export_finished(job, path, read_summary(path), self.board)
        except FedtuneError as error:
            raise RunError(
                f"its adapter is finished, its export is not: {error}; try again with: fedtune export {path}"
            ) from error

    def _open(self, job: Job) -> AdaptedModel:
        if self._model is None or _model_settings(self._model[0]) != _model_settings(job):
            self._model = None  # free the old one before the new one is loaded
            self._model = (job, open_model(job))
        return self._model[1]

    # -- the listening process, and what the keeper does --------------------------------------------------------------

    def _listen(self) -> None:
        self._registered.clear()
        key = self._listener.start()
        link = self._listener.link(key, self.board.problem)
        link.wait_until_ready()
        self._registrar.forget()
        self._link = link
        self._register()
        self._listener.open()
        self._registered.set()

    def _keep(self) -> None:
        reported = ""
        while not self._ending.wait(KEEPER_SECONDS):
            try:
                self.board.write()
                if self._registered.is_set() and self._listener.alive:
                    if changed(self._home) != self._devices_seen:
                        self._register()
                    self._link.refuse_foreign_runs()
                    self._show(self._link.nodes())
                reported = ""
            except Exception as error:  # no error ends the keeper; the same error is reported once
                text = f"keeper: {error if isinstance(error, FedtuneError) else type(error).__name__}"
                if text != reported and not self._ending.is_set():
                    self.board.problem(text)
                reported = text

    def _register(self) -> None:
        """Makes the SuperLink's devices equal to the enrolled ones."""
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
        self.board.keep_devices(set(devices.node_keys))
        for name in devices.node_keys:
            self.board.device(name)

    def _show(self, nodes: list[NodeState]) -> None:
        names = {key: name for name, key in self._devices.node_keys.items()}
        for node in nodes:
            name = names.get(node.public_key)
            if name is None or not node.ever_online:
                continue
            self.board.device(name, state=self._registrar.state(node))
            if node.online_until:
                heard = min(self._clock.now(), node.online_until - HEARTBEAT_PATIENCE_SECONDS)
                self.board.device(name, heard=heard)


def _facts() -> Facts:
    return Facts(peak_rss_mb(), {})


def _check_wanted(job: QueuedJob) -> None:
    """Raises RunCancelledError if a job has been cancelled."""
    if job.is_cancelled:
        raise RunCancelledError(f"{job.name} is cancelled")


def _model_settings(job: Job) -> tuple[object, ...]:
    return (job.model, job.adapter, job.training.weights, job.training.precision)
