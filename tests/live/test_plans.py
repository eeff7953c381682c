"""The exchange of plans between device and server of a live fleet, one side at a time, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]
import pytest
from live_helpers import Fleet, MakeFleet
from lone_device import device_of, manifest
from owner import owner_of

from fedtune.client.live.device_home import ClientHome
from fedtune.client.plan.backend import Measured
from fedtune.client.plan.eligibility import Requirements, Sensors
from fedtune.core.errors import PeerError
from fedtune.core.host.clock import Clock
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.protocol.messages import EVALUATE, OPEN, TRAIN, Refusal, encode, query
from fedtune.core.protocol.registration import ACTION, PROTOCOL_VERSION, Registration, RegistrationReply
from fedtune.core.round_timing import LEAST_WORK
from fedtune.flower.superlink import NodeState
from fedtune.server import cli
from fedtune.server.live.enrolled_devices import Devices
from fedtune.server.live.registrar import REFUSED_SECONDS, Registrar
from fedtune.server.live.status_board import STATUS, Board
from fedtune.server.run_display import Silent

MAINS, BATTERY = Sensors(41.0, True, None, None), Sensors(41.0, False, None, None)


@pytest.fixture
def fleet(make_fleet: MakeFleet) -> Fleet:
    fleet = make_fleet(2)
    fleet.join()
    return fleet


def test_a_device_plans_when_it_is_registered_and_says_so_without_a_word_of_its_data(fleet: Fleet) -> None:
    short, usual = fleet.names
    rows = [{"prompt": "dim =>", "completion": f" {number}"} for number in range(20)]
    data = fleet.folder / "data" / "clients" / f"{short}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = [device_of(fleet, name).register(fleet) for name in (short, usual)]
    assert [(reply.rank, reply.weights, reply.sequence_length, reply.sits_out) for reply in replies] == [
        (16, "dequantized", 64, ""),
        (16, "dequantized", 64, ""),
    ]
    status = fleet.device_status(short)
    assert status["plan"]["plan"]["longest_example"] < 64  # known to the device, but not to the server
    assert status["plan"]["took"]["rounds"] == 0


def test_a_device_that_cannot_do_all_by_the_deadline_does_what_it_can(fleet: Fleet) -> None:
    device = device_of(fleet, fleet.names[0])
    device.register(fleet)
    predicted = device.planned._current().seconds_per_round

    def share(deadline: float) -> float:
        request: Any = SimpleNamespace(work=SimpleNamespace(deadline=deadline))
        return device.planned.share("", request)

    assert share(0.0) == share(2 * predicted) == 1.0  # no deadline, or the device is fast enough
    assert share(predicted / 2) == pytest.approx(0.45)
    assert share(predicted / 1000) == LEAST_WORK


@pytest.mark.parametrize("scores", [False, True])
def test_a_device_scores_for_a_server_only_where_its_owner_says_so(make_fleet: MakeFleet, scores: bool) -> None:
    fleet = make_fleet(1)
    name = fleet.names[0]
    fleet.join(name, scores=scores)
    device = device_of(fleet, name)
    device.register(fleet)
    assert ("scores nothing for a server" in device.refusal(EVALUATE, b"").reason) != scores


def test_a_device_that_nothing_fits_answers_with_the_numbers(fleet: Fleet) -> None:
    with pytest.raises(PeerError, match=r"does not fit this device: the smallest plan .* needs \d+ MB .* 0 MB may be"):
        device_of(fleet, fleet.names[0], reserve=1.0).register(fleet)  # reserve all memory
    assert "may be used" in fleet.device_status(fleet.names[0])["problem"]


def test_a_device_that_sits_out_says_which_condition_and_its_owner_sees_the_reading(fleet: Fleet) -> None:
    name = fleet.names[0]
    device = device_of(fleet, name)
    device.readings.append(BATTERY)
    reply = device.register(fleet)
    assert reply.sits_out == "battery low"
    assert fleet.device_status(name)["sits_out"] == "battery at 41% and not charging; 80% are needed"
    for kind in (query(OPEN), TRAIN):  # a round that begins; rounds in progress are finished
        refusal = device.refusal(kind, b"")
        assert (refusal == Refusal("sits out: battery low", sits_out=True)) == (kind == query(OPEN))
        assert refusal.sits_out == (kind == query(OPEN))
    device.readings.append(MAINS)
    assert device.register(fleet).sits_out == ""
    assert fleet.device_status(name)["sits_out"] == ""


def test_a_process_that_begins_again_plans_for_the_job_it_was_registered_for(fleet: Fleet) -> None:
    name = fleet.names[0]
    unknown = device_of(fleet, name).refusal(query(OPEN), b"", b"")
    assert "has not been registered" in unknown.reason
    device_of(fleet, name).register(fleet)
    again = device_of(fleet, name)
    assert "registered" not in again.refusal(query(OPEN), b"", b"").reason
    assert fleet.device_status(name)["plan"]["plan"]["rank"] == 16


def test_how_fast_an_update_went_up_is_remembered_and_a_short_answer_tells_nothing(fleet: Fleet) -> None:
    name = fleet.names[0]
    device = device_of(fleet, name)
    for size, seconds in ((60_000, 2.0), (100, 1.0)):
        device.work.sent(TRAIN, size, seconds)
    again = device_of(fleet, name)
    assert again.planned.uplink == pytest.approx(30_000, rel=0.02)


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
    invited = str(fleet.home.path / "invitation.json")
    join = ["client", "join", invited, "--name", name, "--data", data, "--home", str(home)]
    with monkeypatch.context() as scarce:
        none_free = psutil.virtual_memory()._replace(available=0)
        scarce.setattr(psutil, "virtual_memory", lambda: none_free)
        assert run(scarce, *join) == 2
    assert "demo: the base model does not fit this device: the smallest plan" in capsys.readouterr().err
    assert not home.exists()
    chosen = ["--only-charging", "--battery-reserve", "30", "--max-temperature", "70", "--unmetered-only"]
    measured = json.dumps(asdict(Measured(0, 9, 9, 40_000_000, 0.1, 256, 1)))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, measured, ""))
    assert run(monkeypatch, *join, *chosen) == 0
    said = capsys.readouterr().out
    assert "plan for demo: dequantized once" in said
    assert "one step:  40 MB" in said
    assert ClientHome(home).config.requirements == Requirements(True, 30.0, 70.0, True)
    assert len(list((home / "calibration").iterdir())) == 1


# -- the server's side -------------------------------------------------------------------------------------------------


class Replies:
    """A grid on which every device answers a registration with the test's reply."""

    def __init__(self, answers: dict[int, bytes]) -> None:
        self.answers = answers
        self.asked: list[int] = []
        self.late: set[int] = set()
        self.resting: set[int] = set()

    def drop_late(self) -> set[int]:
        return self.late

    def sitting_out(self) -> set[int]:
        found, self.resting = self.resting, set()
        return found

    def ask(
        self, nodes: Iterable[int], action: str, group: str, payload: bytes, seconds: float
    ) -> dict[int, bytes | PeerError]:
        asked = list(nodes)
        self.asked += asked
        return {node: self.answers[node] for node in asked}


class Cloud:
    """The server's side without a network; a test moves its clock and sets the online devices."""

    def __init__(self, fleet: Fleet) -> None:
        self.now = 1000.0
        self.devices = Devices.load(fleet.home)
        self.online: list[NodeState] = []
        self.board = Board(fleet.home.path / STATUS, fleet.home.config.address, Silent())
        clock = Clock(lambda: self.now, lambda: self.now)
        self.registrar = Registrar(self.board, lambda: self.online, lambda: self.devices, clock)
        self.registrar.begin(manifest(fleet))

    def connect(self, nodes: dict[str, int]) -> None:
        self.online = [
            NodeState(node, self.devices.node_keys[name], True, time.time() + 30, True) for name, node in nodes.items()
        ]


def test_the_server_keeps_what_it_is_told_of_plans_and_leaves_out_who_tells_absurd_things(fleet: Fleet) -> None:
    fine = RegistrationReply(PROTOCOL_VERSION, "0.1", 2, 4, 8000, "", "", 8, "packed", 64, 120, 1.5)
    absurd = msgspec.structs.replace(fine, rank=512)
    cloud = Cloud(fleet)
    good, bad = fleet.names
    cloud.connect({good: 11, bad: 12})
    assert cloud.registrar.present(Replies({11: encode(fine), 12: encode(absurd)})) == {good: 11}
    assert cloud.registrar.tiers == {good: 8}
    assert cloud.registrar.seconds == {good: 1.5}
    assert cloud.board.devices[good].plan is not None
    assert cloud.board.devices[bad].state == "refused"
    assert "rank 512, and the job's is 16" in cloud.board.devices[bad].dropped
    cloud.board.write()
    plan = json.loads((fleet.home.path / STATUS).read_text())["devices"][good]["plan"]
    assert plan == {"rank": 8, "weights": "packed", "sequence_length": 64, "peak_mb": 120, "seconds": 1.5}


def test_who_sits_out_is_not_asked_to_train_and_is_asked_again_later(fleet: Fleet) -> None:
    rests = RegistrationReply(PROTOCOL_VERSION, "0.1", 2, 4, 8000, "", "too hot", 16, "packed", 64, 120, 1.5)
    cloud = Cloud(fleet)
    name = fleet.names[0]
    cloud.connect({name: 11})
    grid = Replies({11: encode(rests)})
    assert cloud.registrar.present(grid) == {}
    assert cloud.registrar.present(grid) == {}
    assert grid.asked == [11]  # once a minute, not at every call
    assert cloud.board.devices[name].state == "sits out"
    assert cloud.board.devices[name].dropped == "sits out: too hot"
    cloud.now += REFUSED_SECONDS
    grid.answers[11] = encode(msgspec.structs.replace(rests, sits_out=""))
    assert cloud.registrar.present(grid) == {name: 11}
    grid.late = {11}  # it still works on a round that continued without it
    assert cloud.registrar.present(grid) == {}
    grid.late = set()
    assert cloud.board.devices[name].state == "online"
    # It sits out a round, and registers again before the next one.
    grid.answers[11] = encode(rests)
    grid.resting = {11}
    assert cloud.registrar.present(grid) == {}
    assert grid.asked == [11, 11, 11]


def test_words_of_a_device_and_of_a_server_steer_no_terminal(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from fedtune.server.live.status_board import print_status, read_status

    hostile = "[/red]\x1b[2J\x1b]0;owned\x07\n2026-01-01  all is well\x9b31m\u202e"
    reply = RegistrationReply(PROTOCOL_VERSION, hostile, 2, 4, 8000, hostile, hostile, 8, "packed", 64, 120, 1.5)
    cloud = Cloud(fleet)
    name = fleet.names[0]
    cloud.connect({name: 11})
    cloud.registrar.present(Replies({11: encode(reply)}))
    cloud.board.write()
    print_status(Console(width=400, highlight=False), read_status(fleet.home))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "all is well" in line]
    assert line.startswith(name)
    assert "[/red]" in line
    assert line.isprintable()

    device = device_of(fleet, name)
    honest = manifest(fleet).terms
    base = msgspec.structs.replace(honest.base, name=hostile, digest="0" * 64)
    lie = JobManifest.sign(owner_of(fleet.home).key, "job", replace(honest, base=base), time.time() + 60)
    roster = Devices.load(fleet.home).log
    registration = Registration(PROTOCOL_VERSION, "0.1", lie.data, roster)
    assert device.refusal(ACTION, encode(registration))
    problem = fleet.device_status(name)["problem"]
    assert "all is well" in problem
    assert problem.isprintable()


def test_the_status_shows_plans(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from rich.console import Console

    from fedtune.server.live.status_board import print_status

    device = {
        "state": "online",
        "heard": 1.0,
        "rounds": 2,
        "software": "0.1",
        "hardware": "4 cores",
        "dropped": "",
    }
    plan = {"rank": 8, "weights": "packed", "sequence_length": 64, "peak_mb": 120, "seconds": 1.5}
    status = {
        "state": "stopped", "address": "a:1", "certificate_days_left": 9.0, "job": None, "waiting": [], "finished": [],
        "failed": {}, "cancelled": [], "problems": [],
        "devices": {"ann": device | {"plan": plan}, "bob": device | {"plan": None}},
    }  # fmt: skip
    status |= {"fleet": {"entry": 2, "days_left": 9.0, "wait_for_approval": {}}}
    print_status(Console(width=100), status)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ann", "8", "packed", "64", "120", "MB", "1.5", "s"] in lines
    assert sum(line[:1] == ["bob"] for line in lines) == 1  # without a plan yet
