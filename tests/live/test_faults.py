"""Faults of real processes and networks: a live run recovers by itself and loses no acknowledged round."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from live_helpers import Fleet, MakeFleet, MakeProxy, eventually
from owner import revoke

from fedtune.server.run_directory import CHECKPOINTS, read_rounds
from fedtune.strategies.round import LATE

pytestmark = pytest.mark.slow

KILLS = 10
LONG = 500.0
CUT_SECONDS = 60.0
WAITING = "waiting for devices: 0 of 3 are there, 3 more refuse or sit out"
ALL = "federation.clients_per_round=1.0"


def acknowledged(run: Path) -> int:
    """Returns the last round with a checkpoint."""
    return max((int(path.name) for path in (run / CHECKPOINTS).glob("[0-9]*")), default=0)


def outcomes(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of the acknowledged rounds."""
    return read_rounds(run)[: acknowledged(run)]


def survivors(run: Path) -> list[str]:
    lines = read_rounds(run)
    return list(lines[-1]["survivors"]) if lines else []


def dropped(run: Path, name: str) -> list[str]:
    """Returns the reasons why a device dropped out of rounds, in the order of the rounds."""
    found = (client for line in read_rounds(run) for client in line["clients"] if client["id"] == name)
    return [client["dropped"] for client in found if client["dropped"]]


def await_state(fleet: Fleet, name: str, state: str, seconds: float) -> None:
    """Waits until a device reports this state."""
    eventually(lambda: fleet.device_status(name).get("state") == state, seconds, fleet.logs)


def under_way(fleet: Fleet, run: Path, rounds: int = 1) -> None:
    """Starts the server and the devices, and waits for this number of rounds."""
    fleet.start_server()
    fleet.start_devices()
    eventually(lambda: acknowledged(run) >= rounds, LONG, fleet.logs)


def test_ten_kills_of_server_and_devices_cost_no_acknowledged_round(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4, config={"longest_answer": 15.0})
    fleet.join()
    run = fleet.submit("federation.rounds=16", ALL, "data.holdout=0")
    under_way(fleet, run)
    chance = random.Random(0)
    held: list[dict[str, Any]] = []
    for _ in range(KILLS):
        time.sleep(chance.uniform(0.5, 3.0))
        victim = chance.choice([None, *fleet.names])
        if victim is None:
            assert fleet.server is not None
            fleet.server.kill()
            assert outcomes(run)[: len(held)] == held
            held = outcomes(run)
            fleet.start_server()
        else:
            fleet.devices[victim].kill()
            fleet.start_device(victim)
    lines = fleet.finished(run, LONG)
    assert [line["round"] for line in lines] == list(range(1, 17))
    assert lines[: len(held)] == held
    assert any(line["secure"] for line in lines[-3:]), "the last rounds run undisturbed"


def test_a_server_that_is_killed_goes_on_where_it_was_and_devices_come_back(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3)
    fleet.join()
    run = fleet.submit("federation.rounds=6")
    under_way(fleet, run, rounds=2)
    assert fleet.server is not None
    fleet.server.kill()
    before = outcomes(run)
    eventually(lambda: not fleet.leftovers(), 20, lambda: f"the listening process stayed: {fleet.leftovers()}")
    assert fleet.passing_files() == []
    fleet.start_server()
    lines = fleet.finished(run, LONG)
    assert lines[: len(before)] == before
    assert [line["round"] for line in lines] == list(range(1, 7))
    assert lines[-1]["survivors"] == fleet.names


def test_a_device_that_is_killed_while_it_trains_says_so_and_takes_part_again(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    fleet.join()
    run = fleet.submit("federation.rounds=5", ALL, "training.local_steps=20", "data.holdout=0")
    under_way(fleet, run)
    victim = fleet.names[0]

    def trains() -> bool:
        status = fleet.device_status(victim)
        return status["state"] == "working" and str(status["task"]).startswith("train")

    eventually(trains, LONG, fleet.logs)
    fleet.devices[victim].kill()
    fleet.start_device(victim)
    lines = fleet.finished(run, LONG)
    assert any("interrupted" in reason for reason in dropped(run, victim)), dropped(run, victim)
    assert all(line["secure"] for line in lines), "the others' sums came about"
    assert lines[-1]["survivors"] == fleet.names


def test_a_device_may_be_away_for_rounds_and_come_back(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4, config={"wait_seconds": 5.0})
    fleet.join()
    run = fleet.submit("federation.rounds=40", ALL, "data.holdout=0")
    under_way(fleet, run)
    assert survivors(run) == fleet.names
    away = fleet.names[2]
    assert fleet.devices[away].stop() == 0
    gone = acknowledged(run)
    eventually(lambda: acknowledged(run) >= gone + 3, LONG, fleet.logs)
    assert away not in survivors(run)
    fleet.start_device(away)
    eventually(lambda: away in survivors(run), LONG, fleet.logs)


@pytest.mark.parametrize("secure", [True, False])
def test_a_round_by_deadline_goes_on_without_a_device_that_stalls(make_fleet: MakeFleet, secure: bool) -> None:
    fleet = make_fleet(4, config={"wait_seconds": 5.0})
    fleet.join(allow_clear=not secure)
    settings = (f"secure_aggregation.enabled={str(secure).lower()}", ALL, "training.local_steps=20", "data.holdout=0")
    run = fleet.submit("federation.rounds=40", "federation.selection=deadline", *settings)
    under_way(fleet, run)
    slow = fleet.names[1]
    eventually(lambda: str(fleet.device_status(slow).get("task")).startswith("train"), LONG, fleet.logs)
    with fleet.devices[slow].frozen():
        began = time.monotonic()
        eventually(lambda: dropped(run, slow), LONG, fleet.logs)
        assert dropped(run, slow) == [LATE]
        assert time.monotonic() - began < CUT_SECONDS / 2, "the round waited until the device counted as offline"
        eventually(lambda: slow not in survivors(run), LONG, fleet.logs)
    eventually(lambda: slow in survivors(run), LONG, fleet.logs)


def test_two_jobs_in_a_row_and_a_device_that_was_away_for_the_first(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4, config={"wait_seconds": 5.0})
    fleet.join()
    first, second = (
        fleet.submit(ALL, f"federation.run={number}", name=name) for number, name in ((1, "first"), (2, "second"))
    )
    fleet.start_server()
    for name in fleet.names[:3]:
        fleet.start_device(name)
    lines = fleet.finished(first, LONG)
    assert lines[-1]["survivors"] == fleet.names[:3]
    fleet.finished(second, LONG)
    fleet.start_device(fleet.names[3])
    eventually(lambda: fleet.status()["devices"][fleet.names[3]]["state"] == "online", LONG, fleet.logs)
    lines = fleet.finished(fleet.submit(ALL, "federation.run=3", name="third"), LONG)
    assert lines[-1]["survivors"] == fleet.names


def test_a_network_that_is_cut_for_a_minute_costs_time_and_nothing_else(
    make_fleet: MakeFleet, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy()
    fleet = make_fleet(3, config={"address": f"localhost:{proxy.port}"})
    proxy.target = fleet.port
    fleet.join()
    run = fleet.submit("federation.rounds=6")
    under_way(fleet, run)
    proxy.cut()
    time.sleep(CUT_SECONDS)
    assert {fleet.device_status(name)["state"] for name in fleet.names} <= {"waiting", "answering"}
    proxy.mend()
    lines = fleet.finished(run, LONG)
    assert [line["round"] for line in lines] == list(range(1, 7))
    assert lines[-1]["secure"]
    assert sum(bool(line["aborted"]) for line in lines) <= 1


def test_a_blink_of_the_network_leaves_no_device_outside(make_fleet: MakeFleet, make_proxy: MakeProxy) -> None:
    """The device stays online all the time: the server would refuse a new activation while heartbeats arrive."""
    proxy = make_proxy()
    fleet = make_fleet(3, config={"address": f"localhost:{proxy.port}"})
    proxy.target = fleet.port
    fleet.join()
    fleet.start_server()
    fleet.start_devices()
    for name in fleet.names:
        await_state(fleet, name, "connected", LONG)
    for _ in range(3):
        proxy.cut()
        time.sleep(4.0)
        proxy.mend()
        for name in fleet.names:
            await_state(fleet, name, "connected", 20.0)
    assert all("does not take this device in" not in fleet.devices[name].text for name in fleet.names)
    assert fleet.finished(fleet.submit(), LONG)[-1]["secure"]["summed"] == 3


def test_a_link_of_50_kilobits_a_second_is_slow_and_works(make_fleet: MakeFleet, make_proxy: MakeProxy) -> None:
    proxy = make_proxy()
    proxy.bytes_per_second = 50_000 / 8
    fleet = make_fleet(3, config={"address": f"localhost:{proxy.port}"})
    proxy.target = fleet.port
    fleet.join()
    run = fleet.submit("federation.rounds=1", "data.holdout=0")
    fleet.start_server()
    fleet.start_devices()
    lines = fleet.finished(run, LONG)
    assert lines[0]["secure"]["summed"] == 3


def clock_that_is_off(seconds: float) -> str:
    """Returns code that sets a process's clock wrong; libfaketime cannot do it, as it breaks Python's `time.sleep`."""
    return f"""
import datetime, time
real_time, real_datetime, seconds = time.time, datetime.datetime, {seconds}
class WrongDatetime(real_datetime):
    @classmethod
    def now(cls, tz=None):
        return real_datetime.now(tz) + datetime.timedelta(seconds=seconds)
time.time, datetime.datetime = lambda: real_time() + seconds, WrongDatetime
"""


def test_devices_whose_clocks_are_wrong_go_by_the_servers(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3)
    fleet.join()
    run = fleet.submit()
    fleet.start_server()
    offsets = dict(zip(fleet.names, (2 * 86_400.0, -86_400.0, 0.0), strict=True))
    for name, seconds in offsets.items():
        fleet.start_device(name, before=clock_that_is_off(seconds))
    lines = fleet.finished(run, LONG)
    assert [line["secure"]["summed"] for line in lines] == [3, 3]
    for name, seconds in offsets.items():
        assert abs(fleet.device_status(name)["clock_error"] - seconds) < 5.0
        assert ("clock is" in fleet.devices[name].text) == (seconds != 0.0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Makes a separate disk of 64 MB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mounted], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True)


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_device_with_a_full_disk_drops_out_says_why_and_comes_back(make_fleet: MakeFleet, small_disk: Path) -> None:
    fleet = make_fleet(4)
    full = fleet.names[0]
    fleet.client_home(full).symlink_to(small_disk)
    fleet.join()
    run = fleet.submit("federation.rounds=40", ALL, "data.holdout=0")
    under_way(fleet, run)
    assert full in survivors(run)
    ballast = small_disk / "ballast"
    fill(ballast)
    eventually(lambda: full not in survivors(run), LONG, fleet.logs)
    reason = "the device cannot write or read its files: No space left on device"
    eventually(lambda: any(reason in each for each in dropped(run, full)), LONG, fleet.logs)
    assert "No space left on device" in fleet.devices[full].text
    assert fleet.devices[full].running
    ballast.unlink()
    eventually(lambda: full in survivors(run), LONG, fleet.logs)
    eventually(lambda: "No space left" in fleet.device_status(full)["problem"], 10.0)


def test_a_device_of_another_version_is_refused_in_words_on_both_sides(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4, config={"wait_seconds": 5.0})
    fleet.join()
    run = fleet.submit(ALL)
    fleet.start_server()
    old = fleet.names[0]
    fleet.start_device(old, before="import fedtune.core.protocol.messages as messages; messages.PROTOCOL_VERSION = 0")
    for name in fleet.names[1:]:
        fleet.start_device(name)
    lines = fleet.finished(run, LONG)
    assert lines[-1]["survivors"] == fleet.names[1:]
    advice = "Install the same fedtune version on server and clients"
    assert "speaks 0" in fleet.device_status(old)["problem"]
    assert advice in fleet.device_status(old)["problem"]
    status = fleet.status()
    assert status["devices"][old]["state"] == "refused"
    assert any(old in problem["text"] and advice in problem["text"] for problem in status["problems"])


def test_a_revoked_device_is_told_so_and_the_others_go_on_without_it(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4, config={"wait_seconds": 5.0})
    fleet.join()
    under_way(fleet, fleet.submit(ALL, "federation.rounds=1", name="before"))
    revoke(fleet.home, fleet.names[0])
    await_state(fleet, fleet.names[0], "waiting", 60.0)
    status = fleet.device_status(fleet.names[0])
    assert "revoked" in status["problem"]
    assert "join again" in status["problem"]
    lines = fleet.finished(fleet.submit(ALL, name="after"), LONG)
    assert lines[-1]["survivors"] == fleet.names[1:]
    assert set(fleet.status()["devices"]) == set(fleet.names[1:])


def test_devices_without_the_jobs_base_model_say_which_they_have(
    make_fleet: MakeFleet, make_model: Any, tmp_path: Path
) -> None:
    fleet = make_fleet(3)
    fleet.join()
    base = f"model.base={str(make_model('llama'))!r}"
    fleet.submit(base, "adapter.rank=8", "data.evaluation=''", "federation.rounds=1")
    fleet.start_server()
    fleet.start_devices()

    def refused() -> bool:
        return all(fleet.status()["devices"][name]["state"] == "refused" for name in fleet.names)

    eventually(refused, LONG, fleet.logs)
    for name in fleet.names:
        assert "Join with --base DIR" in fleet.device_status(name)["problem"]
    eventually(lambda: fleet.status()["job"]["state"] == WAITING, LONG, fleet.logs)
