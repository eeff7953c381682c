"""How long do an exchange and a secure round take on a live server, against Flower's way of running apps?

The peer is stock Flower as its tutorials run it: flower-superlink, flower-supernode and `flwr run`, which start a
process for every message; without TLS, authentication and a database, which it does not have by default. fedtune runs
as in production: the guarded SuperLink and processes of `fedtune client start`, with TLS, signed requests and SQLite.
Both echo the same bytes by the same code (exchanges.py), and the time of `Grid.send_and_receive` is measured.

    python benchmarks/live/run.py            # ten minutes on two idle cores

An exchange is a message to every client and its answer. The five of a secure round carry as many bytes as they do in
the demo. The second table has whole secure rounds of the demo, with fedtune only, since stock Flower forgets a client
between two messages of a round. A round's overhead is its seconds minus those in which any device trains; masking,
signatures, the sum and the checkpoint are part of it. Two clients are refused there, since a sum over two hides
neither. The first round, in which devices load the base model, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "simulation"))

from fedtune.core.host.process import prepare_environment  # noqa: E402

prepare_environment()

from exchanges import MEGABYTES, ROUND, TRIVIAL, measure, workloads  # noqa: E402  # Flower reads the environment on import
from facts import machine_facts  # noqa: E402

from fedtune.client.live.device_home import ClientHome  # noqa: E402
from fedtune.core.job.job_file import load_job  # noqa: E402
from fedtune.core.manifest.joining import Invitation  # noqa: E402
from fedtune.demo import JOB, write_federation  # noqa: E402
from fedtune.server.fleet.owner_home import OwnerHome  # noqa: E402
from fedtune.server.fleet.signing import sign_job  # noqa: E402
from fedtune.server.live.enrolled_devices import Devices, publish  # noqa: E402
from fedtune.server.live.job_queue import Jobs  # noqa: E402
from fedtune.server.live.server_home import INVITATION, ServerConfig, ServerHome  # noqa: E402
from fedtune.server.live.sockets import Listener  # noqa: E402
from fedtune.server.run_directory import read_rounds  # noqa: E402

BIN = Path(sys.executable).parent
CLIENTS = (2, 8)
SECURE_CLIENTS = (3, 8)
ROUNDS = 4
WAIT_SECONDS = 600.0
COLUMNS = ("exchanges", "clients", "stock Flower s", "fedtune s", "ratio")
ROUND_COLUMNS = ("clients", "round s", "of which no device trained s")
FAST = 10.0  # a trivial exchange must be this many times faster
OVERHEAD_SECONDS = 8.0  # the largest overhead of a secure round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="print the tables, but leave RESULTS.md as it is")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows, rounds = [], []
    for clients in CLIENTS:
        with tempfile.TemporaryDirectory() as folder:
            ours = measure_fedtune(Path(folder), clients)
        with tempfile.TemporaryDirectory() as folder:
            stock = measure_flower(Path(folder), clients)
        for name, seconds in ours.items():
            mine, theirs = statistics.median(seconds), statistics.median(stock[name])
            rows.append((name, str(clients), f"{theirs:.2f}", f"{mine:.2f}", f"{theirs / mine:.1f}x"))
            print(_row(rows[-1]), flush=True)
    for clients in SECURE_CLIENTS:
        with tempfile.TemporaryDirectory() as folder:
            whole, overhead = secure_rounds(Path(folder), clients)
        rounds.append((str(clients), f"{whole:.2f}", f"{overhead:.2f}"))
        print(_row(rounds[-1]), flush=True)
    text = [
        "# Live: the time of an exchange, against Flower's way of running apps",
        machine_facts("benchmarks/live/run.py", sys.argv[1:]),
        f"Load average before the start, from the machine's other work: {load:.1f}.",
        _table(COLUMNS, rows),
        "Whole secure rounds:",
        _table(ROUND_COLUMNS, rounds),
        verdict(rows, rounds),
        (__doc__ or "").partition("\n\n")[2].strip(),
    ]
    print("\n\n".join(text))
    if not options.dry:
        (HERE / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def verdict(rows: Sequence[Sequence[str]], rounds: Sequence[Sequence[str]]) -> str:
    """Returns a sentence about whether the targets are reached."""
    faster = next(float(row[-1].rstrip("x")) for row in rows if row[0] == TRIVIAL)
    exchanges = next(float(row[3]) for row in rows if row[:2] == (ROUND, "8"))
    overhead = next(float(row[-1]) for row in rounds if row[0] == "8")
    met = faster >= FAST and max(exchanges, overhead) < OVERHEAD_SECONDS
    return (
        f"Wanted: a trivial exchange {FAST:.0f} times as fast ({faster:.1f}), and less than {OVERHEAD_SECONDS:.0f} s "
        f"for a secure round with 8 clients beside training ({exchanges:.2f} s of exchanges, {overhead:.2f} s in a "
        f"real round): {'met' if met else 'missed'}."
    )


# -- ours --------------------------------------------------------------------------------------------------------------


def measure_fedtune(folder: Path, clients: int) -> dict[str, list[float]]:
    """Measures echoes over fedtune's listener, link and device processes."""
    home, devices = fleet(folder, clients)
    with Listener(home) as listener:
        link = listener.link(listener.start(), print)
        link.wait_until_ready()
        for name, key in Devices.load(home).node_keys.items():
            link.register(name, key)
        listener.open()
        commands = [[sys.executable, str(HERE / "device.py"), str(device), "echo"] for device in devices]
        with processes(folder, commands), link.open_run(WAIT_SECONDS) as grid:
            wait(lambda: len(grid.get_node_ids()) == clients)
            grid.bound_replies("query", MEGABYTES * 1_000_000)
            measured = measure(grid, grid.get_node_ids(), workloads(clients))
        link.close()
    return measured


def secure_rounds(folder: Path, clients: int) -> tuple[float, float]:
    """Returns the median seconds of a secure round and of its overhead."""
    home, devices = fleet(folder, clients)
    job = load_job(
        JOB,
        [
            f"federation.rounds={ROUNDS}",
            f"federation.clients_per_round={clients}",
            "federation.evaluate_every=0",
            "training.local_steps=5",
            "export.formats=[]",
        ],
    )
    jobs = Jobs(home)
    queued = jobs.submit(job, sign_job(OwnerHome(folder / "owner").key, job, "secure"))
    notes = [device / "trained" for device in devices]
    commands = [
        [str(BIN / "fedtune"), "server", "start", "--home", str(home.path)],
        *(
            [sys.executable, str(HERE / "device.py"), str(device), str(note)]
            for device, note in zip(devices, notes, strict=True)
        ),
    ]
    with processes(folder, commands):
        wait(lambda: jobs.finished() or jobs.failed())
    if reasons := jobs.failed():
        raise RuntimeError(f"{reasons}\n{_output(folder)}")
    rounds = read_rounds(jobs.run_path(queued))
    trained = [[tuple(map(float, line.split())) for line in note.read_text().splitlines()] for note in notes]
    overheads = [
        record["seconds"] - _covered([of_device[index] for of_device in trained]) for index, record in enumerate(rounds)
    ]
    return statistics.median(record["seconds"] for record in rounds[1:]), statistics.median(overheads[1:])


def fleet(folder: Path, clients: int) -> tuple[ServerHome, list[Path]]:
    """Makes a server's folder, and those of devices that joined."""
    port = free_port()
    config = ServerConfig(address=f"localhost:{port}", listen="127.0.0.1", port=port)
    owner = OwnerHome.create(folder / "owner")
    home = ServerHome.create(folder / "server", config, [], owner.first_key)
    write_federation(folder / "data", clients, 0, 60)
    devices, requests = [], []
    for data in sorted((folder / "data" / "clients").glob("*.jsonl")):
        invitation = Invitation.load(home.path / INVITATION)
        device = ClientHome.join(folder / f"device-{data.stem}", invitation, data.stem, data)
        devices.append(device.path)
        if request := device.request:
            requests.append(request)
    owner.approve(requests)
    publish(home, owner.log)
    return home, devices


def _covered(intervals: Sequence[tuple[float, ...]]) -> float:
    """Returns the seconds that lie in at least one interval."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


# -- the peer ----------------------------------------------------------------------------------------------------------


def measure_flower(folder: Path, clients: int) -> dict[str, list[float]]:
    """Measures echoes over stock Flower, which uses the installed packages, since there may be no network."""
    port, out = free_port(), folder / "measured.json"
    flower_home = folder / "flower"
    flower_home.mkdir()
    (flower_home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {"FLWR_HOME": str(flower_home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    commands = [[str(BIN / "flower-superlink"), "--insecure", "--port", str(port)]]
    for _ in range(clients):
        own = str(free_port())
        commands.append(
            [str(BIN / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", own]
        )
    with processes(folder, commands, environment):
        wait(lambda: _listening(port))
        config = f'clients={clients} out="{out}"'
        run = [str(BIN / "flwr"), "run", str(HERE), "here", "--run-config", config]
        subprocess.run(run, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
        wait(out.exists, lambda: _output(folder))
        time.sleep(1.0)  # the file is written at once
    measured: dict[str, list[float]] = json.loads(out.read_text())
    return measured


# -- both --------------------------------------------------------------------------------------------------------------


@contextmanager
def processes(
    folder: Path, commands: Sequence[Sequence[str]], environment: dict[str, str] | None = None
) -> Iterator[None]:
    """Runs programs during the block, each in its own session, so that their child processes end with them."""
    started = []
    try:
        for index, command in enumerate(commands):
            with (folder / f"{index}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
                        start_new_session=True,
                    )
                )
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait(condition: Callable[[], object], explain: Callable[[], str] = lambda: "it did not happen") -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(explain())
        time.sleep(0.1)


def free_port() -> int:
    """Returns a free port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _output(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log")))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(_row, (columns, ["---"] * len(columns), *rows)))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
