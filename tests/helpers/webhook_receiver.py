"""A receiver of webhook events for tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver:
    """A server that keeps what is posted to it, and answers with a status that the test sets."""

    def __init__(self) -> None:
        self.status, self.got = 200, list[dict[str, Any]]()


@contextmanager
def receiving() -> Iterator[tuple[Receiver, str]]:
    """Gives a receiver, and the address at which it listens."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(receiver.status)
            self.send_header("location", "http://localhost/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield receiver, f"http://127.0.0.1:{server.server_port}/hook?token=hidden"
        server.shutdown()
        thread.join()
