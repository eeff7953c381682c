"""What a device and a server of a live fleet say of plans, one side at a time: both in this process, nothing served."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]
import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from live_helpers import Fleet, MakeFleet

from fedtune.client.live import device_loop as service
from fedtune.client.live.device_home import CALIBRATIONS, ClientHome
from fedtune.client.plan.backend import Measured
from fedtune.client.plan.calibration import CalibrationStore
from fedtune.client.plan.device_plan import DevicePlanner
from fedtune.client.plan.eligibility import Requirements
from fedtune.client.plan.planner import RESERVE
from fedtune.client.torch.torch_backend import TorchBackend
from fedtune.core.errors import PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.protocol.actions import EVALUATE, OPEN, TRAIN, query
from fedtune.core.protocol.enrolment import Bundle
from fedtune.core.protocol.payloads import decode, encode
from fedtune.core.protocol.registration import ACTION, PROTOCOL_VERSION, Registration, RegistrationReply, Terms
from fedtune.core.timing import LEAST_WORK
from fedtune.demo import JOB
from fedtune.flower.envelope import seal, unseal
from fedtune.flower.superlink import NodeState
from fedtune.model.base_model import load_base
from fedtune.server import cli
from fedtune.server.job_model import describe_base
from fedtune.server.live import registrar as registrar
from fedtune.server.live import resident_server as server
from fedtune.server.live.enrolled_devices import Devices
from fedtune.server.live.registrar import CurrentJob, terms_of
from fedtune.server.run_display import Silent

DEVICE, SERVER = 7, 1


def terms() -> Terms:
    job = load_job(JOB)
    return terms_of(job, describe_base(job, load_base(job.model).digest))


def ask(device: service.Service, kind: str, content: Any) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 5, SERVER
    request = Message(content, DEVICE, kind, group_id="1")
    TaskIdentity.node_id = DEVICE
    return device._reply(request)


def greet(device: service.Service, fleet: Fleet, *, secure: bool = True) -> RegistrationReply:
    roster = Devices.load(fleet.home).roster.to_bytes()
    registration = Registration(PROTOCOL_VERSION, "0.1", "job", secure, terms(), roster)
    return decode(unseal(ask(device, ACTION, seal(encode(registration)))), RegistrationReply)


@pytest.fixture
def fleet(make_fleet: MakeFleet) -> Fleet:
    fleet = make_fleet(2)
    fleet.join()
    return fleet


class Warm(TorchBackend):
    """The test's process is warm."""

    def warm_up(self) -> None:
        pass


def device_of(fleet: Fleet, name: str, reserve: float = RESERVE) -> service.Service:
    home = ClientHome(fleet.client_home(name))
    planner = DevicePlanner(Warm(), CalibrationStore(home.path / CALIBRATIONS), reserve=reserve)
    return service.Service(home, planner, lambda line: None)


def test_a_device_plans_when_it_is_registered_and_says_so_without_a_word_of_its_data(fleet: Fleet) -> None:
    short, usual = fleet.names
    rows = [{"prompt": "dim =>", "completion": f" {number}"} for number in range(20)]
    data = fleet.folder / "data" / "clients" / f"{short}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = [greet(device_of(fleet, name), fleet) for name in (short, usual)]
    assert [(reply.rank, reply.weights, reply.sequence_length, reply.sits_out) for reply in replies] == [
        (16, "dequantized", 64, ""),
        (16, "dequantized", 64, ""),
    ]
    status = fleet.device_status(short)
    assert status["plan"]["plan"]["longest_example"] < 64  # which the device knows, and the server does not
    assert status["plan"]["took"]["rounds"] == 0


def test_a_device_that_cannot_do_all_by_the_deadline_does_what_it_can(fleet: Fleet) -> None:
    device = device_of(fleet, fleet.names[0])
    greet(device, fleet)
    predicted = device._planned._current().seconds_per_round

    def share(deadline: float) -> float:
        request: Any = SimpleNamespace(work=SimpleNamespace(deadline=deadline))
        return device._planned.share("", request)

    assert share(0.0) == share(2 * predicted) == 1.0  # nobody waits, or it is fast enough
    assert share(predicted / 2) == pytest.approx(0.45)
    assert share(predicted / 1000) == LEAST_WORK


@pytest.mark.parametrize("scores", [False, True])
def test_a_device_scores_for_a_server_only_where_its_owner_says_so(make_fleet: MakeFleet, scores: bool) -> None:
    fleet = make_fleet(1)
    name = fleet.names[0]
    data = fleet.folder / "data" / "clients" / f"{name}.jsonl"
    ClientHome.join(fleet.client_home(name), Bundle.load(fleet.folder / f"{name}.bundle"), data, scores=scores)
    device = device_of(fleet, name)
    greet(device, fleet)
    answer = ask(device, EVALUATE, seal(b""))
    assert ("scores nothing for a server" in str(answer.error.reason)) != scores


def test_a_device_that_nothing_fits_answers_with_the_numbers(fleet: Fleet) -> None:
    with pytest.raises(PeerError, match=r"does not fit this device: the smallest plan .* needs \d+ MB .* 0 MB may be"):
        greet(device_of(fleet, fleet.names[0], reserve=1.0), fleet)  # of everything
    assert "may be used" in fleet.device_status(fleet.names[0])["problem"]


def test_a_device_that_sits_out_says_which_condition_and_its_owner_sees_the_reading(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = fleet.names[0]
    device = device_of(fleet, name)
    battery = SimpleNamespace(percent=41.0, power_plugged=False)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    reply = greet(device, fleet)
    assert reply.sits_out == "battery low"
    assert fleet.device_status(name)["sits_out"] == "battery at 41% and not charging; 80% are needed"
    for kind in (query(OPEN), TRAIN):  # a round that begins; what is under way is brought to its end
        answer = ask(device, kind, seal(b""))
        assert ("sits out: battery low" in str(answer.error.reason)) == (kind == query(OPEN))
    battery.power_plugged = True
    assert greet(device, fleet).sits_out == ""
    assert fleet.device_status(name)["sits_out"] == ""


def test_a_process_that_begins_again_plans_for_the_job_it_was_registered_for(fleet: Fleet) -> None:
    name = fleet.names[0]
    unknown = ask(device_of(fleet, name), query(OPEN), seal(b"", b""))
    assert "has not been greeted" in str(unknown.error.reason)
    greet(device_of(fleet, name), fleet)
    again = device_of(fleet, name)
    assert "greeted" not in str(ask(again, query(OPEN), seal(b"", b"")).error.reason)
    assert fleet.device_status(name)["plan"]["plan"]["rank"] == 16


def test_how_fast_an_update_went_up_is_remembered_and_an_error_tells_nothing(fleet: Fleet) -> None:
    name = fleet.names[0]
    device = device_of(fleet, name)
    refusal = ask(device, TRAIN, seal(b""))
    device._time_link(refusal, 1.0)
    for size, seconds in ((60_000, 2.0), (100, 1.0)):
        TaskIdentity.node_id = SERVER
        request = Message(seal(b""), DEVICE, TRAIN, group_id="1")
        TaskIdentity.node_id = DEVICE
        device._time_link(Message(seal(bytes(size)), reply_to=request), seconds)
    again = device_of(fleet, name)
    assert again._planned.uplink == pytest.approx(30_000, rel=0.02)


def test_when_it_takes_part_is_in_its_folder_and_checked(fleet: Fleet) -> None:
    path = fleet.client_home(fleet.names[0]) / "device.json"
    content = json.loads(path.read_text())
    assert content["requirements"] == {
        "only_charging": False,
        "battery_reserve": 80.0,
        "max_temperature": 80.0,
        "unmetered_only": False,
    }
    content["requirements"]["battery_reserve"] = 30.0
    path.write_text(json.dumps(content))
    assert ClientHome(path.parent).config.requirements == Requirements(battery_reserve=30.0)
    content["requirements"]["battery_reserve"] = 130.0
    path.write_text(json.dumps(content))
    with pytest.raises(Exception, match="damaged"):
        ClientHome(path.parent)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedtune", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_who_joins_is_told_the_plan_or_refused_with_the_numbers(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = make_fleet(1)
    (name,) = fleet.names
    home = fleet.client_home(name)
    data = str(fleet.folder / "data" / "clients" / f"{name}.jsonl")
    join = ["client", "join", str(fleet.folder / f"{name}.bundle"), "--data", data, "--home", str(home)]
    with monkeypatch.context() as scarce:
        none_free = psutil.virtual_memory()._replace(available=0)
        scarce.setattr(psutil, "virtual_memory", lambda: none_free)
        assert run(scarce, *join) == 2
    assert "demo: the base model does not fit this device: the smallest plan" in capsys.readouterr().err
    assert not home.exists()
    chosen = ["--only-charging", "--battery-reserve", "30", "--max-temperature", "70", "--unmetered-only"]
    measured = json.dumps(asdict(Measured(0, 9, 9, 40_000_000, 0.1, 256)))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, measured, ""))
    assert run(monkeypatch, *join, *chosen) == 0
    said = capsys.readouterr().out
    assert "plan for demo: dequantized once" in said
    assert "one step:  40 MB" in said
    assert ClientHome(home).config.requirements == Requirements(True, 30.0, 70.0, True)
    assert len(list((home / "calibration").iterdir())) == 1


# -- the server's side -------------------------------------------------------------------------------------------------


class Replies:
    """A grid on which every device answers a registration as the test says."""

    def __init__(self, answers: dict[int, bytes]) -> None:
        self.answers = answers
        self.asked: list[int] = []
        self.late: set[int] = set()

    def drop_late(self) -> set[int]:
        return self.late

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float) -> list[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(node)
            TaskIdentity.node_id = node
            replies.append(Message(seal(self.answers[node]), reply_to=message))
            TaskIdentity.node_id = SERVER
        return replies


def test_the_server_keeps_what_it_is_told_of_plans_and_leaves_out_who_tells_absurd_things(fleet: Fleet) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 5, SERVER
    fine = RegistrationReply(PROTOCOL_VERSION, "0.1", 2, 4, 8000, "", "", 8, "packed", 64, 120, 1.5)
    absurd = msgspec.structs.replace(fine, rank=512)
    cloud = server.Service(fleet.home, Silent())
    cloud._registrar._job = CurrentJob("job", True, terms())
    good, bad = fleet.names
    nodes = {good: 11, bad: 12}
    grid: Any = Replies({11: encode(fine), 12: encode(absurd)})
    cloud._registrar._ask(grid, nodes, Devices.load(fleet.home).roster)
    assert cloud._registrar.tiers == {good: 8}
    assert cloud._registrar.seconds == {good: 1.5}
    assert cloud._board.devices[good].plan is not None
    assert cloud._board.devices[bad].state == "refused"
    assert "rank 512, and the job's is 16" in cloud._board.devices[bad].dropped
    cloud._board.write([])
    plan = json.loads((fleet.home.path / "status.json").read_text())["devices"][good]["plan"]
    assert plan == {"rank": 8, "weights": "packed", "sequence_length": 64, "peak_mb": 120, "seconds": 1.5}


def test_who_sits_out_is_not_asked_to_train_and_is_asked_again_later(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 5, SERVER
    rests = RegistrationReply(PROTOCOL_VERSION, "0.1", 2, 4, 8000, "", "too hot", 16, "packed", 64, 120, 1.5)
    cloud = server.Service(fleet.home, Silent())
    cloud._registrar._job = CurrentJob("job", True, terms())
    name = fleet.names[0]
    online = [NodeState(11, cloud._devices.node_keys[name], True, time.time() + 30, True)]
    cloud._link = type("Link", (), {"nodes": lambda self: online})()
    grid: Any = Replies({11: encode(rests)})
    assert cloud._registrar.present(grid) == {}
    assert cloud._registrar.present(grid) == {}
    assert grid.asked == [11]  # once a minute, not at every look
    assert cloud._board.devices[name].state == "sits out"
    assert cloud._board.devices[name].dropped == "sits out: too hot"
    monkeypatch.setattr(registrar, "REFUSED_SECONDS", 0.0)
    grid.answers[11] = encode(msgspec.structs.replace(rests, sits_out=""))
    assert cloud._registrar.present(grid) == {name: 11}
    grid.late = {11}  # it still works on a round that has gone on without it
    assert cloud._registrar.present(grid) == {}
    grid.late = set()
    assert cloud._board.devices[name].state == "online"
    # It refuses a round: before the next one it is greeted again.
    from fedtune.core.round_records import ClientRecord

    grid.answers[11] = encode(rests)
    cloud._registrar.client(ClientRecord(name, dropped="no answer: sits out: too hot (code 1)"))
    assert cloud._registrar.present(grid) == {}


def test_words_of_a_device_and_of_a_server_steer_no_terminal(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from fedtune.server.live.status_board import print_status, read_status

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 5, SERVER
    hostile = "[/red]\x1b[2J\x1b]0;owned\x07\n2026-01-01  all is well\x9b31m\u202e"
    reply = RegistrationReply(PROTOCOL_VERSION, hostile, 2, 4, 8000, hostile, hostile, 8, "packed", 64, 120, 1.5)
    cloud = server.Service(fleet.home, Silent())
    cloud._registrar._job = CurrentJob("job", True, terms())
    name = fleet.names[0]
    grid: Any = Replies({11: encode(reply)})
    cloud._registrar._ask(grid, {name: 11}, Devices.load(fleet.home).roster)
    cloud._board.write([])
    print_status(Console(width=400, highlight=False), read_status(fleet.home))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "all is well" in line]
    assert line.startswith(name)
    assert "[/red]" in line
    assert line.isprintable()

    device = device_of(fleet, name)
    base = msgspec.structs.replace(terms().base, name=hostile, digest="0" * 64)
    roster = Devices.load(fleet.home).roster.to_bytes()
    registration = Registration(
        PROTOCOL_VERSION, "0.1", "job", True, msgspec.structs.replace(terms(), base=base), roster
    )
    assert ask(device, ACTION, seal(encode(registration))).has_error()
    problem = fleet.device_status(name)["problem"]
    assert "all is well" in problem
    assert problem.isprintable()


def test_the_status_shows_plans(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from rich.console import Console

    from fedtune.server.live.status_board import print_status

    device = {
        "state": "online",
        "last_heard": 1.0,
        "rounds": 2,
        "software": "0.1",
        "hardware": "4 cores",
        "dropped": "",
    }
    plan = {"rank": 8, "weights": "packed", "sequence_length": 64, "peak_mb": 120, "seconds": 1.5}
    status = {
        "state": "stopped", "address": "a:1", "certificate_days_left": 9.0, "job": None, "waiting": [], "finished": [],
        "failed": {}, "problems": [], "devices": {"ann": device | {"plan": plan}, "bob": device | {"plan": None}},
    }  # fmt: skip
    print_status(Console(width=100), status)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ann", "8", "packed", "64", "120", "MB", "1.5", "s"] in lines
    assert sum(line[:1] == ["bob"] for line in lines) == 1  # with no plan yet
