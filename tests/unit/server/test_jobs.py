"""Jobs of a server: their order, their end by hand, and their history."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from owner import make_server, owner_of

from fedtune.core.errors import InputError, RunCancelledError
from fedtune.core.host.private_files import write_private
from fedtune.core.job.job_file import dump_job, load_job
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.protocol.messages import Base
from fedtune.core.round_records import ClientRecord, Evaluation, RoundRecord, Work
from fedtune.server import cli
from fedtune.server.live.job_desk import Ending, JobDesk
from fedtune.server.live.job_history import all_jobs
from fedtune.server.live.job_queue import Jobs, QueuedJob
from fedtune.server.live.server_home import ServerConfig, ServerHome
from fedtune.server.live.status_board import Board, read_status
from fedtune.server.run_display import Silent

BASE = Base("demo", "0" * 64, "nf4", 16, 32.0, ("all-linear",), 64)


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    return make_server(tmp_path / "cloud", ServerConfig("localhost:8443", "127.0.0.1", 0))


def submit(home: ServerHome, name: str, run: int, priority: int = 0) -> QueuedJob:
    """Submits a job that the owner has signed; `run` makes its terms its own."""
    job = load_job(None, ["training.learning_rate=0.01", f"federation.run={run}"])
    manifest = JobManifest.sign(owner_of(home).key, name, JobTerms(job, BASE), 2e9)
    return Jobs(home).submit(Job(), manifest, priority)


def write_rounds(home: ServerHome, job: QueuedJob, count: int, scored: bool = True) -> None:
    """Writes the run directory of a job that has done some rounds."""
    run = Jobs(home).run_path(job)
    run.mkdir()
    (run / "job.toml").write_text(dump_job(job.load()))
    clients = (ClientRecord("ann"), ClientRecord("bob", dropped="gone"))
    score = Evaluation(loss=0.5, exact_match=0.75, examples=4, tokens=9) if scored else None
    work = (Work("training", 4, flops=5e9, tokens=10, seconds=1.5),)
    lines = [
        RoundRecord(1 + number, 2.0, "R", 0.1, clients, 1.5, eval=score, work=work).to_json() for number in range(count)
    ]
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Runs a command; returns its exit status, and its output, on one line."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((out + err).split())


def test_the_most_urgent_job_comes_first_and_the_oldest_of_those(home: ServerHome) -> None:
    for number, (name, priority) in enumerate((("first", 0), ("second", 0), ("urgent", 5), ("later", -1)), 1):
        submit(home, name, number, priority)
    jobs = Jobs(home)
    assert [job.name for job in jobs.waiting()] == ["urgent", "first", "second", "later"]
    again = submit(home, "later", 4, 9)  # the same job, with another priority
    assert (again.number, again.priority) == (4, 9)
    assert jobs.next() == again


def test_a_waiting_job_that_is_cancelled_leaves_the_queue_at_once_while_the_server_is_down(
    home: ServerHome, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(home, "first", 1)
    submit(home, "second", 2)
    where = ("--home", str(home.path))
    assert run(capsys, "server", "cancel", "first", *where) == (0, "first: cancelled before its first round ended")
    assert [job.name for job in Jobs(home).waiting()] == ["second"]
    status = read_status(home)
    assert (status["waiting"], status["cancelled"]) == (["second"], ["first"])
    code, said = run(capsys, "server", "cancel", "first", *where)
    assert (code, said) == (2, "first: this job is cancelled already; there is nothing to cancel")
    code, said = run(capsys, "server", "cancel", "third", *where)
    assert (code, "the last are first, second; all: fedtune server jobs" in said) == (2, True)
    with pytest.raises(InputError, match="has the same terms"):  # devices may have served some of its rounds
        submit(home, "again", 1)


def test_a_running_server_ends_a_cancelled_job_itself(home: ServerHome, capsys: pytest.CaptureFixture[str]) -> None:
    job = submit(home, "first", 1)
    with home.lock:
        code, said = run(capsys, "server", "cancel", "first", "--home", str(home.path))
    assert (code, said) == (0, "first: the server ends it now; see fedtune server show first")
    jobs = Jobs(home)
    assert (jobs.waiting(), jobs.cancelled(), jobs.next()) == ([], ["first"], job)
    endings: list[Ending] = []
    JobDesk(jobs, lambda job: pytest.fail("it has no rounds to keep"), endings.append).take(job)
    assert [(ending.state, ending.reason) for ending in endings] == [
        ("cancelled", "cancelled before its first round ended")
    ]
    assert (jobs.cancelled(), jobs.next()) == (["first"], None)


def test_a_job_with_rounds_that_is_cancelled_while_the_server_is_down_is_closed_when_it_starts(
    home: ServerHome, capsys: pytest.CaptureFixture[str]
) -> None:
    job = submit(home, "first", 1)
    write_rounds(home, job, 3)
    code, said = run(capsys, "server", "cancel", "first", "--home", str(home.path))
    assert (code, said) == (
        0,
        "first: cancelled after 3 of 20 rounds; the server writes its adapter when it starts again",
    )
    shown = run(capsys, "server", "show", "first", "--home", str(home.path))[1]
    assert "ending: cancelled after 3 of 20 rounds" in shown
    submit(home, "urgent", 2, 9)
    jobs = Jobs(home)
    assert jobs.next() == job  # before all others
    worked: list[str] = []

    def close(job: QueuedJob) -> None:
        worked.append(job.name)
        raise RunCancelledError("it is cancelled")

    JobDesk(jobs, close, lambda ending: None).take(job)
    (first, urgent) = all_jobs(jobs, None)
    assert worked == ["first"]
    assert (first.state, first.reason, first.rounds_done) == ("cancelled", "cancelled after 3 of 20 rounds", 3)
    assert urgent.state == "waiting"


def test_a_cancelled_job_that_cannot_be_closed_is_not_tried_again(home: ServerHome) -> None:
    job = submit(home, "first", 1)
    write_rounds(home, job, 1)
    jobs = Jobs(home)
    jobs.cancel("first")

    def stumble(job: QueuedJob) -> None:
        raise InputError("the base model is gone")

    JobDesk(jobs, stumble, lambda ending: None).take(job)
    (record,) = all_jobs(jobs, None)
    assert record.state == "cancelled"
    assert record.reason == "cancelled after 1 of 20 rounds; it could not be closed: the base model is gone"


def test_jobs_and_show_tell_what_happened_to_every_job(home: ServerHome, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = Jobs(home)
    for number, name in enumerate(("done", "broken", "current", "next"), 1):
        submit(home, name, number)
    entries = {job.name: job for job in jobs.waiting()}
    for name, rounds in (("done", 16), ("current", 12)):
        write_rounds(home, entries[name], rounds)
    before = time.time()
    jobs.finish(entries["done"])
    jobs.fail(entries["broken"], "no base [red]model[/red]")
    now = {"pid": os.getpid(), "written": time.time(), "started": 0, "job": {"name": "current"}}
    write_private(home.path / "status.json", json.dumps(now))
    with home.lock:
        code, printed = run(capsys, "server", "jobs", "--json", "--home", str(home.path))
        listed: list[dict[str, Any]] = json.loads(printed)
        _, table = run(capsys, "server", "jobs", "--home", str(home.path))
        _, shown = run(capsys, "server", "show", "current", "--home", str(home.path))
        one = json.loads(run(capsys, "server", "show", "current", "--json", "--home", str(home.path))[1])
        none = json.loads(run(capsys, "server", "show", "next", "--json", "--home", str(home.path))[1])
    assert code == 0
    assert one["costs"]["total"]["flops"] == 12 * 5e9
    assert none["costs"] is None
    assert [(job["number"], job["name"], job["state"], job["rounds_done"]) for job in listed] == [
        (1, "done", "finished", 16),
        (2, "broken", "failed", 0),
        (3, "current", "running", 12),
        (4, "next", "waiting", 0),
    ]
    assert listed[0]["ended"] >= before - 1
    assert listed[0]["submitted"] <= listed[0]["ended"]
    assert listed[2]["score"]["exact_match"] == 0.75
    assert "12/20" in table
    assert "broken: no base [red]model[/red]" in table
    assert "rounds 12 of 20" in shown
    assert "2 earlier rounds in" in shown
    assert "round 12: 0:02, 1 of 2 clients, 0 B moved, loss 1.500, exact match 75.0%" in shown
    assert "next: fedtune server logs current --follow" in shown
    _, shown = run(capsys, "server", "show", "broken", "--home", str(home.path))
    assert "state failed: no base [red]model[/red]" in shown
    assert "choose another --name and --set federation.run=N" in shown


def test_a_server_without_jobs_says_how_to_submit_one(home: ServerHome, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "server", "jobs", "--home", str(home.path))
    assert (code, said) == (0, "no job yet; submit one with: fedtune server submit job.toml")


def test_a_server_that_starts_again_remembers_devices_and_counts_their_rounds_on(tmp_path: Path) -> None:
    first = Board(tmp_path / "status.json", "localhost:8443", Silent())
    for name in ("ann", "bob"):
        first.device(name, state="online", heard=1000.0, software="0.1")
    first.device("new")
    record = RoundRecord(1, 2.0, "R", 0.1, (ClientRecord("ann"), ClientRecord("bob", dropped="gone")), 1.5)
    first.round(record)  # written at once: the process may be killed before the next second
    first.problem("a disk was full")
    first.write()
    second = Board(tmp_path / "status.json", "localhost:8443", Silent())
    second.remember()
    assert (second.devices["ann"].state, second.devices["ann"].rounds, second.devices["ann"].heard) == (
        "offline",
        1,
        1000,
    )
    assert (second.devices["bob"].rounds, second.devices["new"].state) == (0, "never seen")
    assert [problem.text for problem in second.problems] == ["a disk was full"]
    second.round(record)
    assert second.devices["ann"].rounds == 2
    second.round(RoundRecord(2, 2.0, "R", 0.1, (ClientRecord("ann"),), None, aborted="too few"))
    assert second.devices["ann"].rounds == 2


@pytest.mark.parametrize("left", ["", "{}", '{"devices": {"ann": {"last_heard": "soon"}}, "problems": []}', "[1]"])
def test_a_status_that_is_damaged_or_of_an_earlier_release_is_no_reason_not_to_start(tmp_path: Path, left: str) -> None:
    path = tmp_path / "status.json"
    path.write_text(left)
    Board(path, "localhost:8443", Silent()).remember()
