"""The live server with jobs that fail."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from owner import make_server, owner_of

from fedtune.core.errors import InputError, RunError
from fedtune.core.host.private_files import write_private
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.protocol.messages import Base
from fedtune.server.live.job_desk import MAX_ERRORS, Ending, JobDesk
from fedtune.server.live.job_queue import Jobs
from fedtune.server.live.server_home import ServerConfig, ServerHome
from fedtune.server.live.status_board import read_status


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    return make_server(tmp_path / "cloud", ServerConfig("localhost:8443", "127.0.0.1", 0))


BASE = Base("demo", "0" * 64, "nf4", 16, 32.0, ("all-linear",), 64)


def manifest(home: ServerHome, name: str, *overrides: str) -> JobManifest:
    """Returns a job that the owner has signed with the key in force."""
    job = load_job(None, ["training.learning_rate=0.01", *overrides])
    return JobManifest.sign(owner_of(home).key, name, JobTerms(job, BASE), 2e9)


def test_the_same_job_needs_another_run_number_and_is_told_so_before_devices_refuse_it(home: ServerHome) -> None:
    jobs = Jobs(home)
    jobs.finish(jobs.submit(Job(), manifest(home, "first")))
    with pytest.raises(InputError, match=r"job first has the same terms.* --set federation\.run=2"):
        jobs.submit(Job(), manifest(home, "second"))
    with pytest.raises(InputError, match=r"first: a job of this name was submitted before"):
        jobs.submit(Job(), manifest(home, "first"))
    jobs.submit(Job(), manifest(home, "second", "federation.run=2"))


def test_the_job_in_progress_does_not_wait(home: ServerHome) -> None:
    jobs = Jobs(home)
    for number, name in enumerate(("first", "second"), 1):
        jobs.submit(Job(), manifest(home, name, f"federation.run={number}"))
    now = {"pid": os.getpid(), "written": time.time(), "job": {"name": "first"}}
    write_private(home.path / "status.json", json.dumps(now))
    assert read_status(home)["waiting"] == ["first", "second"]  # the server is stopped
    with home.lock:
        assert read_status(home)["waiting"] == ["second"]


def test_a_job_that_waits_keeps_its_place_when_its_owner_signs_it_again(home: ServerHome) -> None:
    jobs = Jobs(home)
    first, other = jobs.submit(Job(), manifest(home, "first")), manifest(home, "other", "federation.run=2")
    jobs.submit(Job(), other)
    owner_of(home).rotate()
    again = manifest(home, "first")
    assert jobs.submit(Job(), again) == first
    assert [entry.name for entry in jobs.waiting()] == ["first", "other"]
    assert [entry.manifest() for entry in jobs.waiting()] == [again.data, other.data]
    for changed in (manifest(home, "first", "federation.run=3"), manifest(home, "third")):
        with pytest.raises(InputError, match=r"was submitted before|has the same terms"):
            jobs.submit(Job(), changed)
    assert [entry.manifest() for entry in jobs.waiting()] == [again.data, other.data]


def test_a_job_over_which_the_server_stumbles_again_and_again_fails_and_the_server_goes_on(
    home: ServerHome, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = Jobs(home)
    job = jobs.submit(Job(), manifest(home, "strange"))

    def stumble(job: object) -> None:
        raise RuntimeError("could not create a primitive")

    endings: list[Ending] = []
    desk = JobDesk(jobs, stumble, endings.append)
    for _ in range(MAX_ERRORS - 1):
        with pytest.raises(RunError, match="RuntimeError: could not create a primitive"):  # tried again after a pause
            desk.take(job)
    assert [waiting.name for waiting in jobs.waiting()] == ["strange"]
    desk.take(job)
    assert jobs.failed() == {"strange": "RuntimeError: could not create a primitive"}
    assert [ending.text for ending in endings] == [
        "job strange failed, 3 times: RuntimeError: could not create a primitive; the log has the traceback"
    ]
    assert "Traceback" in capsys.readouterr().err
