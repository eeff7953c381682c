"""The listening process: the guarded SuperLink on two sockets that `fedtune server start` has opened.

    python -m fedtune.server.live.listener HOME PUBLIC_FD PRIVATE_FD

Devices are admitted after `OPEN` on standard input, when the SuperLink knows the enrolled devices. The process ends
with its standard input, which means that its parent process has ended in any way; then it removes its temporary files.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
from pathlib import Path

from fedtune.core.errors import InputError
from fedtune.core.host.private_files import read_bounded
from fedtune.flower.guard import Guard
from fedtune.flower.superlink import link_app
from fedtune.server.live.enrolled_devices import EnrolledKeys
from fedtune.server.live.join_endpoint import JoinEndpoint
from fedtune.server.live.model_registry import ModelEndpoints
from fedtune.server.live.server_home import ServerHome

OPEN = b"open\n"
CONTROL_KEY = "control.key"
DATABASE = "link.db"
MAX_CONNECTIONS = 20_000
KEEP_ALIVE_SECONDS = 75  # longer than an idle device's pause between polls, which saves TLS handshakes


def main() -> None:
    """Serves until standard input ends or SIGTERM comes."""
    import uvicorn

    from fedtune.core.host.connections import MAX_HEAD_BYTES, bounded_http

    home, public, private = Path(sys.argv[1]), *(socket.socket(fileno=int(number)) for number in sys.argv[2:4])
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # unauthenticated clients' failures would fill the log
    key = read_bounded(home / CONTROL_KEY, "the control key").decode()
    name = private.getsockname()
    served = ServerHome(home)
    app = JoinEndpoint(ModelEndpoints(link_app(home / DATABASE, key), served), served)
    guard = Guard(app, (name[0], name[1]), key, EnrolledKeys(served))
    config = uvicorn.Config(
        guard,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=True,  # from it a device learns that its clock is wrong
        http=bounded_http(),
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=2,
        ssl_certfile=str(home / "server.pem"),
        ssl_keyfile=str(home / "server.key"),
    )
    server = uvicorn.Server(config)

    def follow_parent() -> None:
        while line := sys.stdin.buffer.readline():
            if line == OPEN:
                guard.open()
        server.should_exit = True

    threading.Thread(target=follow_parent, daemon=True, name="parent").start()
    server.run(sockets=[public, private])
    if _is_current(home, key):
        remove_passing(home)


def remove_passing(home: Path) -> None:
    """Removes the files of one listening process: the control key and messages in transit."""
    for name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", CONTROL_KEY):
        (home / name).unlink(missing_ok=True)


def _is_current(home: Path, key: str) -> bool:
    """Returns whether no later server has started in this folder."""
    try:
        return read_bounded(home / CONTROL_KEY, "the control key").decode() == key
    except InputError:
        return False


if __name__ == "__main__":
    main()
