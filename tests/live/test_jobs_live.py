"""Jobs of a running server, whose processes are real: cancelled, restarted, looked at and fetched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live_helpers import Fleet, MakeFleet, Process, eventually
from webhook_receiver import receiving

from fedtune.server.run_directory import read_rounds, read_summary

ALL = "federation.clients_per_round=1.0"


def fedtune(fleet: Fleet, *words: str) -> tuple[int, str]:
    """Runs a `fedtune server` command; returns its exit status and what it printed."""
    command = [sys.executable, "-m", "fedtune.server.cli", "server", *words, "--home", str(fleet.home.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_running_job_is_cancelled_with_its_adapter_and_the_next_one_runs(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    fleet = make_fleet(3)
    fleet.join()
    run = fleet.submit(ALL, "federation.rounds=500", 'tracking.to=["tensorboard"]', name="long")
    fleet.start_server()
    fleet.start_devices()
    eventually(lambda: len(read_rounds(run)) >= 2, complaint=fleet.logs)
    tracked = run / "tracking" / "tensorboard.json"
    eventually(lambda: tracked.is_file() and json.loads(tracked.read_text())["done"] >= 1, complaint=fleet.logs)
    after = fleet.submit(ALL, "federation.run=2", name="next")
    # A restart in between: nothing is forgotten.
    before = fleet.status()["devices"]
    assert fleet.server is not None
    fleet.server.kill()
    fleet.start_server()
    eventually(lambda: fleet.status()["state"] == "running", complaint=fleet.logs)
    for name, device in fleet.status()["devices"].items():
        assert device["state"] != "never seen"
        assert device["rounds"] >= before[name]["rounds"] >= 1
        assert device["software"]
    done = len(read_rounds(run))
    eventually(lambda: len(read_rounds(run)) > done, complaint=fleet.logs)
    counted = fleet.status()["devices"].values()
    assert all(device["rounds"] <= len(read_rounds(run)) for device in counted), "no round counts twice"

    follower = Process(
        "server", "logs", "long", "--follow", "--home", str(fleet.home.path), log=fleet.folder / "followed.log"
    )
    assert (
        "this job is running; fetch it when it has ended"
        in fedtune(fleet, "fetch", "long", "--out", str(tmp_path / "a"))[1]
    )
    code, said = fedtune(fleet, "cancel", "long")
    assert (code, said) == (0, "long: the server ends it now; see fedtune server show long\n")
    eventually(
        lambda: json.loads(fedtune(fleet, "show", "long", "--json")[1])["state"] == "cancelled", complaint=fleet.logs
    )
    rounds = len(read_rounds(run))
    assert f"cancelled after {rounds} of 500 rounds" in fedtune(fleet, "show", "long")[1]
    summary = read_summary(run)
    assert (summary["status"], summary["rounds"], summary["clients"]) == ("cancelled", rounds, 3)
    track = [sys.executable, "-m", "fedtune.server.cli", "track", str(run)]
    subprocess.run(track, check=True)  # what the server did not wait for on a busy machine; otherwise nothing
    assert json.loads(tracked.read_text()) == {"run": "tensorboard", "done": rounds, "ended": True}
    assert follower.ended() == 0
    lines = follower.text.splitlines()
    assert f"job long cancelled after {rounds} of 500 rounds" in lines[-1]
    assert [f"round {number}/500" in follower.text for number in (1, rounds)] == [True, True], "from both processes"
    out = tmp_path / "results"
    code, said = fedtune(fleet, "fetch", "long", "--out", str(out))
    assert (code, sorted(said.split())) == (0, sorted(str(path) for path in out.iterdir()))
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "report.html").is_file()

    fleet.finished(after)
    listed = json.loads(fedtune(fleet, "jobs", "--json")[1])
    assert [(job["name"], job["state"]) for job in listed] == [("long", "cancelled"), ("next", "finished")]
    assert listed[1]["ended"] >= listed[0]["ended"] >= listed[0]["began"]


def test_a_job_that_waits_for_devices_which_never_come_is_cancelled_too(make_fleet: MakeFleet) -> None:
    with receiving() as (receiver, url):
        fleet = make_fleet(3, config={"webhook": url})
        fleet.join()
        run = fleet.submit(ALL)
        server = fleet.start_server("--metrics", "0")
        waiting = "waiting for devices"
        eventually(lambda: waiting in str((fleet.status()["job"] or {}).get("state")), complaint=fleet.logs)
        found = re.search(r"metrics at (http://127\.0\.0\.1:\d+/metrics)", server.text)
        assert found is not None
        metrics = httpx.get(found[1])
        for line in (
            'fedtune_jobs{state="running"} 1.0',
            'fedtune_job_info{name="job"} 1.0',
            "fedtune_devices_enrolled 3.0",
        ):
            assert line in metrics.text
        assert httpx.get(found[1], headers={"host": "evil.example"}).status_code == 403
        with httpx.stream("GET", found[1].replace("/metrics", "/events"), timeout=30) as stream:
            news = next(line for line in stream.iter_lines() if line.startswith("data: "))
        shown = json.loads(news.removeprefix("data: "))
        assert shown["job"]["name"] == "job"
        assert waiting in shown["job"]["state"]
        assert sorted(shown["clients"]) == fleet.names
        assert fedtune(fleet, "cancel", "job")[0] == 0
        eventually(lambda: receiver.got, complaint=fleet.logs)
        assert (receiver.got[0]["event"], receiver.got[0]["job"]) == ("job cancelled", "job")
    early = "state      cancelled before its first round ended"
    eventually(lambda: early in fedtune(fleet, "show", "job")[1], complaint=fleet.logs)
    assert not (run / "adapter").exists()
    assert fleet.status()["job"] is None
