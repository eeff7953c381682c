"""How long after its start is a device at its first answered call?

    fedtune edge pack demo --out packs/demo
    python benchmarks/edge/first_poll.py --pack packs/demo [--python ENV/bin/python]

A server and a device run on this machine; the device is started and stopped again and again, by the Python of an
environment with [edge] alone where --python names one. The clock stops when the device prints that it is connected,
which it does once the server has answered its first call. A row has the median and the slowest start in seconds, and
the median of the seconds of processor time until then.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from fedtune.demo import write_federation

COLUMNS = ("device", "starts", "seconds to the first answer", "slowest", "processor seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="an edge pack of the bundled base")
    parser.add_argument("--python", default=sys.executable, help="the device's Python")
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--port", type=int, default=9453)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, processor = zip(*measured(Path(folder), options), strict=True)
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * len(COLUMNS))))
    cells = (f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}", f"{statistics.median(processor):.2f}")
    print(f"| {' | '.join(('edge pack', str(options.starts), *cells))} |")


def measured(folder: Path, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Returns (seconds, processor seconds) until the first answered call, of each start but the first."""
    os.environ["FEDTUNE_FLEET_HOME"] = str(folder / "owner")
    home, device, clients = folder / "server", folder / "device", folder / "data"
    write_federation(clients, 1, 0, 60)
    data = next((clients / "clients").glob("*.jsonl"))
    fedtune(sys.executable, "server", "init", "--home", home, "--address", f"127.0.0.1:{options.port}")
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command(sys.executable, "server", "start", "--home", home), stdout=log, stderr=log)
    try:
        join = ("client", "join", home / "invitation.json", "--data", data, "--base", options.pack.absolute())
        said = fedtune(options.python, *join, "--name", "device", "--no-try", "--home", device)
        code = re.search(r"approve ([A-Z0-9-]+)", said)
        request = code[1] if code and "has the request" in said else device / "request.json"
        fedtune(sys.executable, "fleet", "approve", request, "--server-home", home)
        return [one_start(options.python, device) for _ in range(options.starts + 1)][1:]
    finally:
        server.terminate()
        server.wait()


def one_start(python: str, home: Path) -> tuple[float, float]:
    """Starts a device, waits for its first answered call, and stops it."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command(python, "client", "start", "--home", home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "connected":
                times = psutil.Process(process.pid).cpu_times()
                return time.perf_counter() - began, times.user + times.system
        raise SystemExit("the device ended before it was connected")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def command(python: str, *arguments: object) -> list[str]:
    return [python, "-m", "fedtune.server.cli", *map(str, arguments)]


def fedtune(python: str, *arguments: object) -> str:
    return subprocess.run(command(python, *arguments), check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
