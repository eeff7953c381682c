"""The webhook: what it tells, and that no address, however bad, delays the server or is complained of twice."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from owner import make_server
from webhook_receiver import receiving

from fedtune.core.errors import InputError
from fedtune.core.round_records import ClientRecord, Evaluation, RoundRecord
from fedtune.server.live.job_queue import QueuedJob
from fedtune.server.live.server_home import ServerConfig, ServerHome
from fedtune.server.live.webhook import MAX_WAITING, JobEvents, Webhook

JOB = QueuedJob(3, "lamp", Path("jobs/waiting/000003-lamp.toml"))


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_event_of_a_job_is_posted_with_numbers_and_without_anything_of_its_clients() -> None:
    problems: list[str] = []
    with receiving() as (receiver, url), Webhook(url, "fleet:8443", problems.append) as hook:
        events = JobEvents(hook, JOB)
        events.begin(2, 5, 3, 0)
        clients = (ClientRecord("ann", loss=0.123), ClientRecord("bob", dropped="a secret of bob"))
        score = Evaluation(loss=0.5, exact_match=0.75, examples=4, tokens=9)
        events.round(RoundRecord(3, 2.0, "R", 0.1, clients, 1.5, eval=score))
        hook.tell("job finished", JOB)
        until(lambda: len(receiver.got) == 3)
    assert [event["event"] for event in receiver.got] == ["job started", "round finished", "job finished"]
    begun, done, _ = receiver.got
    assert (begun["job"], begun["number"], begun["rounds_done"], begun["rounds"]) == ("lamp", 3, 2, 5)
    assert begun["server"] == "fleet:8443"
    assert (done["asked"], done["answered"], done["exact_match"], done["train_loss"]) == (2, 1, 0.75, 1.5)
    text = json.dumps(receiver.got)
    assert not any(word in text for word in ("ann", "bob", "secret", "0.123"))
    assert problems == []


def test_an_address_that_fails_is_complained_of_once_until_it_works_again_and_without_its_secret_part() -> None:
    problems: list[str] = []
    with receiving() as (receiver, url), Webhook(url, "fleet:8443", problems.append) as hook:
        receiver.status = 500
        for count in (1, 2, 3):
            hook.tell("job started", JOB)
            until(lambda count=count: len(receiver.got) == count)
        until(lambda: problems)
        receiver.status = 200
        hook.tell("job started", JOB)
        until(lambda: len(receiver.got) == 4)
        receiver.status = 302  # the operator has set one address, and no other is called
        hook.tell("job started", JOB)
        until(lambda: len(problems) == 2)
        assert len(receiver.got) == 5
    assert problems[0] == (
        "webhook at 127.0.0.1: it answers 500; events are lost until it works again; its address is webhook in "
        "server.toml"
    )
    assert "it answers 302" in problems[1]
    assert "hidden" not in "".join(problems)


def test_an_address_that_hangs_delays_nothing_and_what_it_cannot_take_is_left_out() -> None:
    problems: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        began = time.monotonic()
        with Webhook(url, "fleet:8443", problems.append, timeout=30.0) as hook:
            for _ in range(3 * MAX_WAITING):
                hook.tell("round finished", JOB)
            told = time.monotonic() - began
        ended = time.monotonic() - began
    assert told < 1.0
    assert ended < 3.0, "nor does it delay the server's end"
    assert len(problems) == 1
    assert f"{MAX_WAITING} events wait" in problems[0]


def test_an_address_at_which_nobody_listens_is_said_once() -> None:
    problems: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Webhook(f"http://127.0.0.1:{port}/", "fleet:8443", problems.append) as hook:
        for _ in range(3):
            hook.tell("job started", JOB)
        until(lambda: problems)
    assert len(problems) == 1
    assert "ConnectError" in problems[0]


def test_without_an_address_nothing_happens() -> None:
    with Webhook("", "fleet:8443", pytest.fail) as hook:
        hook.tell("job started", JOB)


@pytest.mark.parametrize(
    "url", ["hooks.example.org", "ftp://hooks.example.org", "https://", "file:///etc", "http://[1"]
)
def test_the_address_is_checked_when_the_configuration_is_read(tmp_path: Path, url: str) -> None:
    home = make_server(tmp_path / "cloud", ServerConfig("localhost:8443", webhook="https://hooks.example.org/a"))
    assert home.config.webhook == "https://hooks.example.org/a"
    text = (home.path / "server.toml").read_text()
    (home.path / "server.toml").write_text(text.replace("https://hooks.example.org/a", url))
    with pytest.raises(InputError, match=r"server\.toml: webhook: expected an address such as"):
        ServerHome(home.path)
