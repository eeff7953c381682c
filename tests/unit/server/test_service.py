"""The live server with jobs that fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from owner import make_server, owner_of

from fedtune.core.errors import InputError, RunError
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.protocol.messages import Base
from fedtune.server.live.job_queue import Jobs
from fedtune.server.live.resident_server import MAX_ERRORS, JobDesk
from fedtune.server.live.server_home import ServerConfig

BASE = Base("demo", "0" * 64, "nf4", 16, 32.0, ("all-linear",), 64)


def test_the_same_job_needs_another_run_number_and_is_told_so_before_devices_refuse_it(tmp_path: Path) -> None:
    home = make_server(tmp_path / "cloud", ServerConfig("localhost:8443", "127.0.0.1", 0))
    jobs, key = Jobs(home), owner_of(home).key

    def manifest(name: str, *overrides: str) -> JobManifest:
        job = load_job(None, ["training.learning_rate=0.01", *overrides])
        return JobManifest.sign(key, name, JobTerms(job, BASE), 2e9)

    jobs.finish(jobs.submit(Job(), manifest("first")))
    with pytest.raises(InputError, match=r"job first has the same terms.* --set federation\.run=2"):
        jobs.submit(Job(), manifest("second"))
    jobs.submit(Job(), manifest("second", "federation.run=2"))


def test_a_job_over_which_the_server_stumbles_again_and_again_fails_and_the_server_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = make_server(tmp_path / "cloud", ServerConfig("localhost:8443", "127.0.0.1", 0))
    jobs = Jobs(home)
    terms = JobTerms(load_job(None, ["training.learning_rate=0.01"]), BASE)
    job = jobs.submit(Job(), JobManifest.sign(owner_of(home).key, "strange", terms, 2e9))

    def stumble(job: object) -> None:
        raise RuntimeError("could not create a primitive")

    reports: list[str] = []
    desk = JobDesk(jobs, stumble, reports.append)
    for _ in range(MAX_ERRORS - 1):
        with pytest.raises(RunError, match="RuntimeError: could not create a primitive"):  # tried again after a pause
            desk.take(job)
    assert [waiting.name for waiting in jobs.waiting()] == ["strange"]
    desk.take(job)
    assert jobs.failed() == {"strange": "RuntimeError: could not create a primitive"}
    assert reports == [
        "job strange failed, 3 times: RuntimeError: could not create a primitive; the log has the traceback"
    ]
    assert "Traceback" in capsys.readouterr().err
