"""A whole live federation in real processes: all of a user's steps, from init to an adapter in the run directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from federation_helpers import run as simulate
from live_helpers import SMALL, Fleet, MakeFleet, eventually

from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import CORE_RANK
from fedtune.demo import JOB
from fedtune.server.run_directory import read_summary


def test_a_submitted_job_becomes_the_adapter_of_its_simulation_and_nothing_stays_behind(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    fleet = make_fleet(3)
    fleet.join()
    everybody = "federation.clients_per_round=1.0"
    run = fleet.submit(everybody)  # submitted before the server runs, so it waits in the queue
    server = fleet.start_server()
    fleet.start_devices()
    rounds = fleet.finished(run)
    assert [line["survivors"] for line in rounds] == [fleet.names, fleet.names]
    assert [line["secure"]["summed"] for line in rounds] == [3, 3]  # the server saw only sums over three
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    # A simulation of the job gives the same adapter, bit for bit; its quality is not tested here.
    data = (f"data.train={fleet.folder / 'data' / 'clients' / '*.jsonl'}", "data.evaluation=")
    simulated = simulate(load_job(JOB, [*SMALL, everybody, *data]), tmp_path / "simulated")
    assert read_summary(run)["adapter_digest"] == simulated["adapter_digest"]
    status = fleet.status()
    assert status["state"] == "running"
    assert {device["state"] for device in status["devices"].values()} == {"online"}
    assert {device["rounds"] for device in status["devices"].values()} == {2}
    # Each device planned before it trained, and has measured its prediction.
    assert {device["plan"]["rank"] for device in status["devices"].values()} == {CORE_RANK}
    took = fleet.device_status(fleet.names[0])["plan"]["took"]
    assert (took["rounds"], took["peak_bytes"] > 0, took["seconds"] > 0) == (2, True, True)
    # The devices have got the fleet's log, whose second entry approved all of them.
    from fedtune.client.live.device_home import ROUNDS, ClientHome

    assert {ClientHome(fleet.client_home(name)).fleet.number for name in fleet.names} == {2}

    # A second process for the same device is refused, and so is a second server.
    again = _fedtune("client", "start", "--home", str(fleet.client_home(fleet.names[0])))
    assert (again.returncode, "serves it already" in again.stderr) == (2, True)
    again = _fedtune("server", "start", "--home", str(fleet.home.path))
    assert (again.returncode, "serves it already" in again.stderr) == (2, True)

    stopped = _fedtune("server", "stop", "--home", str(fleet.home.path))
    assert (stopped.returncode, str(server.pid) in stopped.stdout) == (0, True)
    assert server.ended() == 0
    waiting = eventually(lambda: _waiting(fleet), complaint=fleet.logs)
    assert "trying again" in fleet.devices[fleet.names[0]].text
    assert waiting["trying"] >= 1
    shown = _fedtune("client", "status", "--home", str(fleet.client_home(fleet.names[0])))
    assert shown.returncode == 0
    assert "waiting to try again in" in shown.stdout
    assert "the server cannot be reached (is it running, and is its address right?)" in shown.stdout
    left = _fedtune("client", "leave", "--home", str(fleet.client_home(fleet.names[0])))
    assert left.returncode == 0
    home = fleet.client_home(fleet.names[0])
    assert f"kept {home / ROUNDS}" in left.stdout
    assert [each.name for each in home.iterdir()] == [ROUNDS]
    assert list(home.joinpath(ROUNDS).iterdir()), "what was served stays known"
    for name in fleet.names[1:]:
        assert fleet.devices[name].stop() == 0
    eventually(lambda: not fleet.leftovers(), 10, lambda: f"still running: {fleet.leftovers()}")
    assert fleet.passing_files() == []


def _waiting(fleet: Fleet) -> dict[str, object] | None:
    status = fleet.device_status(fleet.names[0])
    return status if status.get("state") == "waiting" else None


def _fedtune(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedtune.server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd)
