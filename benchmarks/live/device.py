"""A device of the benchmark: the process of `fedtune client start`, which echoes, or notes when it trained.

python benchmarks/live/device.py HOME echo
python benchmarks/live/device.py HOME FILE      # appends a line "begin end" to FILE for each time it trained
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from fedtune.core.host.environment import limit_pieces, prepare_environment

prepare_environment()
limit_pieces(128 << 10)

import exchanges  # noqa: E402  # Flower reads the environment when it is imported
from flwr.app import Context, Message, RecordDict  # noqa: E402

from fedtune.client.live.device_home import ClientHome  # noqa: E402
from fedtune.client.live.device_loop import Service  # noqa: E402


def main() -> None:
    home, task = ClientHome(Path(sys.argv[1])), sys.argv[2]
    with home.lock:
        service = Service(home, lambda line: print(line, flush=True))
        if task == "echo":
            service._reply = lambda message: exchanges.app(message, _context(message))  # it has not been greeted
        else:
            make = service._make_apps

            def make_noting() -> None:
                make()
                service._secure_app = _noting(service._secure_app, Path(task))

            service._make_apps = make_noting
            make_noting()
        service.run()


def _context(message: Message) -> Context:
    return Context(message.metadata.run_id, message.metadata.dst_node_id, {}, RecordDict(), {})


def _noting(app: Any, path: Path) -> Any:
    def noted(message: Message, context: Context) -> Message:
        began = time.time()
        try:
            return app(message, context)
        finally:
            if message.metadata.message_type == "train":
                with path.open("a") as file:
                    file.write(f"{began} {time.time()}\n")

    return noted


if __name__ == "__main__":
    main()
