"""Mistakes of operators and device owners give one line with the fault and the next step, and exit status 2."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from owner import enroll, invitation, make_server

from fedtune.client.live.device_home import ClientHome
from fedtune.client.live.device_loop import BACKOFF_SECONDS, DeviceLoop
from fedtune.client.live.device_status import TRANSITIONS, DeviceReport
from fedtune.client.live.fleet_link import Answer
from fedtune.client.live.registered_device import RegisteredDevice
from fedtune.client.live.signed_http import UnreachableError
from fedtune.core.errors import InputError, PeerError
from fedtune.core.host.clock import SYSTEM_CLOCK, Backoff, Clock
from fedtune.core.host.process import Stopped
from fedtune.core.manifest.joining import Invitation, JoinRequest, PrivateKeys
from fedtune.core.protocol.device_calls import Assignment
from fedtune.core.protocol.messages import EVALUATE, Refusal, Request
from fedtune.server import cli
from fedtune.server.live.certificates import make_server_certificate
from fedtune.server.live.listener import CONTROL_KEY
from fedtune.server.live.server_home import INVITATION, ServerConfig, ServerHome
from fedtune.server.live.sockets import Listener

Command = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    """Makes a server's folder, beside its owner's, with the device ada."""
    home = make_server(tmp_path / "cloud", ServerConfig("localhost:8443", "127.0.0.1", 0))
    enroll(home, "ada")
    (tmp_path / "invitation.json").write_bytes((home.path / INVITATION).read_bytes())
    (tmp_path / "data.jsonl").write_text('{"text": "one example"}\n')
    return home


@pytest.fixture
def refused(
    home: ServerHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Gives refused("client", "join", ...), which returns a command's refusal, which must be one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDTUNE_SERVER_HOME", "cloud")
    monkeypatch.setenv("FEDTUNE_CLIENT_HOME", "device")
    monkeypatch.setenv("FEDTUNE_FLEET_HOME", "owner")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fedtune", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr().err
        assert caught.value.code == 2, said
        assert said.count("\n") == 1, said
        return said

    return run


def test_an_invitation_that_is_none_is_refused(refused: Command, tmp_path: Path) -> None:
    join = ("client", "join", "--data", "data.jsonl")
    assert "No such file" in refused(*join, "nothing.json")
    assert "an invitation, which `fedtune server init` writes: it is not JSON" in refused(*join, "cloud/server.toml")
    whole = (tmp_path / "invitation.json").read_text()
    for name, text, complaint in (
        ("cut", whole[:300], "it is not JSON"),
        ("other", '{"format": "fedtune-invitation-99"}', "no invitation of this version"),
        ("earlier", '{"format": "fedtune-bundle-1", "name": "ada"}', "a bundle of an earlier release"),
        ("short", '{"format": "fedtune-invitation-1"}', "no invitation of this version"),
        ("elsewhere", whole.replace("localhost:8443", "nowhere"), "the invitation is damaged"),
        ("paperless", whole.replace("BEGIN CERTIFICATE", "BEGIN PAPER"), "the invitation is damaged"),
        ("keyless", whole.replace('"fleet_key": "', '"fleet_key": "ff'), "the invitation is damaged"),
    ):
        (tmp_path / name).write_text(text)
        assert complaint in refused(*join, name)
    assert not (tmp_path / "device").exists()


def test_a_missing_or_empty_data_file_is_refused_when_a_device_joins(refused: Command, tmp_path: Path) -> None:
    assert "nowhere.jsonl: cannot read the data file: No such" in refused(
        "client", "join", "invitation.json", "--data", "nowhere.jsonl"
    )
    (tmp_path / "empty.jsonl").touch()
    assert "the data file is empty" in refused("client", "join", "invitation.json", "--data", "empty.jsonl")
    assert "/nowhere: not a model directory" in refused(
        "client", "join", "invitation.json", "--data", "data.jsonl", "--base", "/nowhere"
    )
    assert not (tmp_path / "device").exists()


def test_a_machine_is_one_device_at_a_time(refused: Command, tmp_path: Path) -> None:
    assert "there is no device here; make one with: fedtune client join" in refused("client", "start")
    ClientHome.join(tmp_path / "device", Invitation.load(tmp_path / "invitation.json"), "bob", tmp_path / "data.jsonl")
    said = refused("client", "join", "invitation.json", "--data", "data.jsonl")
    assert said.endswith("there is a device here already; remove it with: fedtune client leave\n")
    said = refused("client", "start", "--home", "elsewhere")
    assert said.endswith("fedtune client join INVITATION --data FILE --home elsewhere\n")
    ClientHome.join(tmp_path / "b", Invitation.load(tmp_path / "invitation.json"), "bob", tmp_path / "data.jsonl")
    said = refused("client", "join", "invitation.json", "--data", "data.jsonl", "--home", "b")
    assert said.endswith("remove it with: fedtune client leave --home b\n")


def test_keys_that_others_may_read_are_not_used(refused: Command, tmp_path: Path) -> None:
    (tmp_path / "cloud").chmod(0o755)
    assert "must be its owner's only; run: chmod 700 cloud" in refused("server", "start")


def test_devices_have_names_of_their_own(refused: Command, home: ServerHome, tmp_path: Path) -> None:
    (tmp_path / "again.json").write_bytes(JoinRequest.make("ada", PrivateKeys.generate()).to_bytes())
    assert "ada: there is a device of this name; revoke it first" in refused("fleet", "approve", "again.json")
    assert "a device's name has 1 to 64 letters" in refused(
        "client", "join", "invitation.json", "--name", "../ada", "--data", "data.jsonl"
    )
    assert "bob: no such device; known: ada" in refused("fleet", "revoke", "bob")


def test_a_fleet_s_owner_is_told_what_is_wrong(refused: Command, home: ServerHome, tmp_path: Path) -> None:
    assert "no fleet here; make one with: fedtune fleet init" in refused("fleet", "status", "--home", "none")
    assert "there is a fleet here already" in refused("fleet", "init")
    assert "no such code waits here, and no such file; waiting: none" in refused("fleet", "approve", "AAAA-BBBB")
    assert "expected a device's request to join" in refused("fleet", "approve", "data.jsonl")
    assert "no device waits for approval" in refused("fleet", "approve", "--all")
    init = ("server", "init", "--address", "localhost:1", "--home", "other", "--fleet")
    assert "a fleet's public key has 64 hexadecimal digits" in refused(*init, "data.jsonl")
    log = (home.path / "fleet.jsonl").read_text().splitlines(keepends=True)
    for name, text, complaint in (
        ("older", "".join(log[:-1]), "the fleet's log is older than the one that this side holds"),
        ("cut", "".join(log) + log[-1][:50], "the fleet's log is cut off"),
        ("twice", "".join(log) + log[-1], "does not follow entry"),
        ("changed", "".join(log).replace('"number":1,', '"number":1, '), "an entry was changed or taken back"),
    ):
        (tmp_path / name).write_text(text)
        assert complaint in refused("server", "publish", name)


def test_a_server_needs_an_address_and_a_folder_of_its_own(refused: Command) -> None:
    assert "expected HOST:PORT" in refused("server", "init", "--address", "fleet.example.org", "--home", "other")
    assert "there is a server here already" in refused("server", "init", "--address", "localhost:8443")
    assert "there is no server here; make one with: fedtune server init" in refused(
        "server", "status", "--home", "none"
    )


def test_a_busy_port_is_named(refused: Command, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = (tmp_path / "cloud" / "server.toml").read_text().replace("port = 0", f"port = {port}")
        (tmp_path / "cloud" / "server.toml").write_text(config)
        said = refused("server", "start")
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; change listen or port in server.toml" in said


def test_a_port_that_a_killed_servers_listener_still_holds_is_waited_for(home: ServerHome) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    config = home.path / "server.toml"
    config.write_text(config.read_text().replace("port = 0", f"port = {port}"))
    (home.path / CONTROL_KEY).write_text("of the one that was killed")
    end = threading.Timer(0.5, taken.close)
    end.start()
    with Listener(ServerHome(home.path)) as listener:
        assert listener.port == port
    end.join()
    assert not (home.path / CONTROL_KEY).exists()


def test_an_expired_certificate_is_told_before_devices_refuse_it(refused: Command, home: ServerHome) -> None:
    expired = make_server_certificate(home._load("authority"), ["localhost"], days=-1)
    (home.path / "server.pem").write_bytes(expired.certificate)
    (home.path / "server.key").write_bytes(expired.key)
    assert "expired; make a new one with: fedtune server renew" in refused("server", "start")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.evaluation=/nowhere.jsonl", "/nowhere.jsonl: cannot be read: No such file"),
        ("model.base=/nowhere", "/nowhere: not a directory; expected a Hugging Face model directory"),
        ("federation.rounds=0", "federation.rounds"),
    ],
)
def test_a_job_that_the_server_cannot_do_is_not_queued(
    refused: Command, home: ServerHome, override: str, complaint: str
) -> None:
    assert complaint in refused("server", "submit", "--set", override)
    assert not list((home.path / "jobs" / "waiting").iterdir())


def test_a_stopped_server_still_knows_who_is_enrolled(
    home: ServerHome, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedtune", "server", "status", "--home", str(home.path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "ada" in capsys.readouterr().out


def task(action: str = "train") -> Assignment:
    return Assignment("0" * 64, action, "1", (b"",))


class Line:
    """A link with a test's sequence of events, which ends the process after the last one."""

    clock_error = 0.0

    def __init__(self, *pulls: Assignment | Exception | None, answers: Sequence[Exception] = ()) -> None:
        self._pulls, self._answers = list(pulls), list(answers)
        self.answers: list[Answer] = []

    def connect(self) -> None: ...

    def beat(self) -> bool:
        return True

    def take(self) -> Assignment | None:
        if not self._pulls:
            raise Stopped
        if isinstance(pulled := self._pulls.pop(0), Exception):
            raise pulled
        return pulled

    def fetch(self, task: Assignment) -> Request:
        return Request(task.action, task.group, task.parts)

    def answer(self, task: Assignment, answer: Answer) -> None:
        if self._answers:
            raise self._answers.pop(0)
        self.answers.append(answer)

    def leave(self) -> None: ...

    def close(self) -> None: ...


class Worker:
    """Work that answers with the action's name, refuses to evaluate, and records the calls about sent answers."""

    def __init__(self) -> None:
        self.sends: list[tuple[str, int]] = []

    def answer(self, request: Request) -> bytes | Refusal:
        return Refusal("no scores") if request.action == EVALUATE else request.action.encode()

    def cannot_store(self, action: str, error: OSError) -> Refusal:
        return Refusal(f"{action}: {error.strerror}")

    def sent(self, action: str, size: int, seconds: float) -> None:
        self.sends.append((action, size))


@pytest.fixture
def joined(home: ServerHome, tmp_path: Path) -> ClientHome:
    return ClientHome.join(tmp_path / "device", invitation(home), "ada", tmp_path / "data.jsonl")


def no_space(path: Path, content: bytes | str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def loop_of(joined: ClientHome, line: Line, pauses: list[float], **settings: Any) -> tuple[DeviceLoop, DeviceReport]:
    """Makes a device's loop on that link, whose pauses are recorded and take no time."""
    clock = replace(SYSTEM_CLOCK, sleep=pauses.append)
    report = DeviceReport(joined.path, "ada", "localhost:1", lambda text: None, clock)
    link: Any = line
    work = settings.pop("work", Worker())
    return DeviceLoop(joined, link, work, report, clock, **settings), report


def test_a_full_disk_is_an_answer_and_not_the_end_of_the_process(joined: ClientHome) -> None:
    line = Line(task())
    clock = Clock()
    report = DeviceReport(joined.path, "ada", "localhost:1", lambda text: None, clock, no_space)
    link: Any = line
    planned: Any = SimpleNamespace(open_trainer=None, load_examples=None, share=None)
    work = RegisteredDevice(joined, planned, report)
    DeviceLoop(joined, link, work, report, clock, no_space).run()
    (answer,) = line.answers
    assert answer.outcome == Refusal("the device cannot write or read its files: No space left on device")
    assert report.status.problem.startswith("train: No space left on device")


def test_a_line_that_breaks_while_an_answer_is_brought_brings_the_same_one_later(joined: ClientHome) -> None:
    pauses: list[float] = []
    line, work = Line(task(), task(EVALUATE), answers=[UnreachableError("no network")] * 3), Worker()
    loop, report = loop_of(joined, line, pauses, work=work)
    loop.run()
    assert [answer.outcome for answer in line.answers] == [b"train", Refusal("no scores")]
    assert work.sends == [("train", 5)]  # a refusal's seconds say nothing about the link
    assert len([pause for pause in pauses if pause >= BACKOFF_SECONDS[0] / 2]) == 3
    assert (report.status.state, report.status.answered) == ("stopped", 2)
    assert not (joined.path / "working").exists()


def test_whatever_a_server_sends_the_process_goes_on(joined: ClientHome) -> None:
    pauses: list[float] = []
    line = Line(PeerError("not a message"), UnreachableError("no network"), task())
    loop, report = loop_of(joined, line, pauses)
    loop.run()
    assert [answer.outcome for answer in line.answers] == [b"train"]
    assert report.status.problem == "no network"


def test_what_cannot_happen_to_a_device_is_refused_and_changes_nothing(joined: ClientHome) -> None:
    _, report = loop_of(joined, Line(), [])
    states = {state for state, _ in TRANSITIONS} | set(TRANSITIONS.values())
    events = {event for _, event in TRANSITIONS}
    for state in states:
        for event in events:
            report.tell(state=state)
            if (state, event) in TRANSITIONS:
                report.happens(event)
                assert report.status.state == TRANSITIONS[state, event]
            else:
                with pytest.raises(ValueError, match=f"{state} never {event}"):
                    report.happens(event)
                assert report.status.state == state


def test_a_damaged_log_is_told_when_the_device_starts(joined: ClientHome, home: ServerHome) -> None:
    damaged = (home.path / "fleet.jsonl").read_text().replace('"number":1', '"number":7')
    (joined.path / "fleet.jsonl").write_text(damaged)
    loop, _ = loop_of(joined, Line(), [])
    with pytest.raises(InputError, match="not signed with this fleet's key; leave and join again"):
        loop.run()


def test_pauses_double_up_to_a_limit_and_differ_between_devices() -> None:
    first, longest = BACKOFF_SECONDS
    for draw, share in ((0.0, 0.5), (1.0, 1.0)):
        backoff = Backoff(first, longest, partial(float, draw))
        pauses = [backoff.next() for _ in range(20)]
        assert pauses[:4] == [share * first * 2**n for n in range(4)]
        assert pauses[-1] == share * longest
        backoff.reset()
        assert backoff.next() == share * first
