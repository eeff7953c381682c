"""The server's two sockets, public and private, and the child process that serves them."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from fedtune.core.errors import InputError
from fedtune.core.host.private_files import write_private
from fedtune.flower.superlink import Link
from fedtune.server.live.listener import CONTROL_KEY, OPEN, remove_passing
from fedtune.server.live.server_home import ServerHome

LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.2
_STOP_SECONDS = 5.0
_FOLLOW_SECONDS = 10.0
_BACKLOG = 1024


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
        """Binds the public socket, with retries since a killed server's listening process may hold it for a moment."""
        config = self._home.config
        end = time.monotonic() + _FOLLOW_SECONDS
        while (self._home.path / CONTROL_KEY).exists() and time.monotonic() < end:
            with suppress(InputError):
                return _bind(config.listen, config.port)
            time.sleep(_POLL_SECONDS)
        return _bind(config.listen, config.port)

    @property
    def port(self) -> int:
        """The number of the public socket."""
        assert self._public is not None
        return int(self._public.getsockname()[1])

    @property
    def private_port(self) -> int:
        """The number of the private socket."""
        assert self._private is not None
        return int(self._private.getsockname()[1])

    def link(self, key: str, report: Callable[[str], None]) -> Link:
        """Returns this process's link to the child process whose control key `start` has returned."""
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
        """Returns whether the child process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Starts the child process with a new database.

        Returns:
            The control key for its private socket.
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
            stdin=subprocess.PIPE,  # closes when this process ends in any way, which ends the child too
            pass_fds=handles,
            start_new_session=True,  # Ctrl-C reaches only the parent, which ends the child later
            umask=0o077,
        )
        return key

    def open(self) -> None:
        """Admits devices, which were told to retry until now, since the SuperLink knows them."""
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # the child has just ended, which another thread notices
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
