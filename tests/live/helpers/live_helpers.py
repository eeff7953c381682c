"""Fleets of real processes for tests: a server, devices, and a network between them that can be cut and slowed."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from owner import approve, invitation, make_server, owner_of

from fedtune.demo import write_federation
from fedtune.server.live.server_home import ServerConfig
from fedtune.server.run_directory import read_rounds

PATIENCE_SECONDS = 120.0
SMALL = (
    "federation.rounds=2",
    "training.local_steps=2",
    "training.batch_tokens=256",
    "federation.evaluate_every=0",
    "export.formats=[]",
)


def free_port() -> int:
    """Returns a free port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def eventually(
    condition: Callable[[], Any],
    seconds: float = PATIENCE_SECONDS,
    complaint: Callable[[], str] = lambda: "it did not happen",
) -> Any:
    """Returns the condition's first true value; fails with the complaint if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(complaint())


class Process:
    """A running `fedtune` command and its output.

    Args:
        before: Python code that the process runs first, for example to pretend to be an older version.
        environment: environment variables for this process only.
    """

    def __init__(
        self, *arguments: str, log: Path, before: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self._output = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{before}\nfrom fedtune.server.cli import main; main()", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
            start_new_session=True,
        )
        self.pid = self._process.pid

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Kills the process with SIGKILL."""
        self._process.kill()
        self._process.wait(10)
        self._output.close()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stops the process with SIGSTOP during the block and continues it afterwards."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Asks the process to end and returns its exit status."""
        if self.running:
            self._process.send_signal(number)
        return self.ended(seconds)

    def ended(self, seconds: float = 60.0) -> int:
        """Waits until the process ends by itself and returns its exit status."""
        try:
            return self._process.wait(seconds)
        finally:
            self._process.kill()
            self._process.wait()
            self._output.close()


class Fleet:
    """A server's folder, devices' folders, and their processes.

    Args:
        folder: the folder for all files.
        devices: the number of devices that have data here; `join` makes them devices of the fleet.
        examples: the number of examples of each device.
    """

    def __init__(self, folder: Path, devices: int, examples: int = 20, config: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        settings: dict[str, Any] = {"wait_seconds": 60.0} | (config or {})
        address = settings.pop("address", f"localhost:{self.port}")
        self.home = make_server(
            folder / "server", ServerConfig(address=address, listen="127.0.0.1", port=self.port, **settings)
        )
        write_federation(folder / "data", devices, 0, examples, 12)
        self.names = [path.stem for path in sorted((folder / "data" / "clients").glob("*.jsonl"))]
        self.server: Process | None = None
        self.devices: dict[str, Process] = {}

    def client_home(self, name: str) -> Path:
        return self.folder / f"device-{name}"

    def join(self, *names: str, **settings: Any) -> None:
        """Makes device folders, and has the owner approve the devices."""
        from fedtune.client.live.device_home import ClientHome
        from fedtune.client.plan.eligibility import Consent

        requests = []
        for name in names or self.names:
            data = self.folder / "data" / "clients" / f"{name}.jsonl"
            made = ClientHome.join(
                self.client_home(name), invitation(self.home), name, data, consent=Consent(**settings)
            )
            assert made.request is not None
            requests.append(made.request)
        approve(self.home, *requests)

    def start_server(self, *options: str, **settings: Any) -> Process:
        log = self.folder / "server.log"
        self.server = Process("server", "start", "--home", str(self.home.path), *options, log=log, **settings)
        return self.server

    def start_device(self, name: str, **settings: Any) -> Process:
        log = self.folder / f"device-{name}.log"
        process = Process("client", "start", "--home", str(self.client_home(name)), log=log, **settings)
        self.devices[name] = process
        return process

    def start_devices(self) -> None:
        for name in self.names:
            self.start_device(name)

    def submit(self, *overrides: str, name: str = "job") -> Path:
        """Submits a small job and returns its run directory."""
        from fedtune.core.job.job_file import load_job
        from fedtune.demo import JOB
        from fedtune.server.fleet.signing import sign_job
        from fedtune.server.live.job_queue import Jobs

        jobs, job = Jobs(self.home), load_job(JOB, [*SMALL, *overrides])
        return jobs.run_path(jobs.submit(job, sign_job(owner_of(self.home).key, job, name)))

    def status(self) -> dict[str, Any]:
        from fedtune.server.live.status_board import read_status

        return read_status(self.home)

    def device_status(self, name: str) -> dict[str, Any]:
        path = self.client_home(name) / "status.json"
        try:
            value: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return value

    def finished(self, run: Path, seconds: float = PATIENCE_SECONDS) -> list[dict[str, Any]]:
        """Waits for a run's end and returns its rounds."""

        def done() -> bool:
            assert run.name not in self.status()["failed"], self.status()["failed"]
            return run.name in self.status()["finished"]

        eventually(done, seconds, self.logs)
        return read_rounds(run)

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in self.folder.glob("*.log"))

    def leftovers(self) -> list[int]:
        """Returns processes that work in the fleet's folder but are not the fleet's, or should have ended."""
        known = [*self.devices.values(), *([self.server] if self.server else [])]
        running = {process.pid for process in known if process.running}
        if self.server and self.server.running:  # its listening process belongs to it
            running |= {child.pid for child in psutil.Process(self.server.pid).children()}
        found = []
        for process in psutil.process_iter(["cmdline"]):
            here = any(str(self.folder) in part for part in process.info["cmdline"] or [])
            if here and process.pid not in running:
                found.append(process.pid)
        return found

    def passing_files(self) -> list[str]:
        """Returns the files that must not outlast the server: messages in transit, and the private socket's key."""
        return [path.name for path in self.home.path.glob("link.db*")] + [
            path.name for path in self.home.path.glob("*control.key*")
        ]

    def close(self) -> None:
        for process in [*self.devices.values(), *([self.server] if self.server else [])]:
            process.stop()


class Proxy:
    """A TCP proxy between devices and their server: it can cut every connection, and limit its speed.

    Before anything connects, `target` must be set to the server's port on this machine.
    """

    def __init__(self) -> None:
        self.target = 0
        self.bytes_per_second: float | None = None
        self._cut = threading.Event()
        self._closed = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._pairs: list[socket.socket] = []
        self._budget = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends every connection, and accepts no new one."""
        self._cut.set()
        for end in self._pairs:
            _shut(end)

    def mend(self) -> None:
        """Accepts connections again."""
        self._cut.clear()

    def close(self) -> None:
        self._closed.set()
        self.cut()
        self._socket.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._socket.accept()
            except OSError:
                return
            if self._cut.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=10)
            except OSError:
                near.close()
                continue
            self._pairs += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while not self._cut.is_set():
                ready, _, _ = select.select([source], [], [], 0.5)
                if not ready:
                    continue
                data = source.recv(4096)
                if not data:
                    break
                if self.bytes_per_second:
                    with self._budget:  # all connections share one link, as behind a modem
                        time.sleep(len(data) / self.bytes_per_second)
                sink.sendall(data)
        except (OSError, ValueError):
            pass
        finally:
            _shut(source)
            _shut(sink)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


MakeFleet = Callable[..., Fleet]
MakeProxy = Callable[[], Proxy]
