"""A device decides by itself whether it trains now, from its own sensors."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from fedtune.client.plan.eligibility import Requirements, Sensors, not_now
from fedtune.client.plan.machine import sense

ROUTES = "Iface\tDestination\tGateway\tFlags\nwwan0\t0002A8C0\t00000000\t0001\n{interface}\t00000000\t0102A8C0\t0003\n"


@pytest.mark.parametrize(
    ("sensors", "reason"),
    [
        (Sensors(None, None, None, None), None),
        (Sensors(90.0, False, 60.0, False), None),
        (Sensors(10.0, True, 60.0, True), None),
        (Sensors(79.0, False, None, None), "battery at 79% and not charging; 80% are needed"),
        (Sensors(79.0, None, None, None), "battery at 79% and not charging; 80% are needed"),
        (Sensors(None, None, 91.0, None), "91 °C; at most 80 °C are allowed"),
    ],
)
def test_a_device_says_why_it_does_not_train_now(sensors: Sensors, reason: str | None) -> None:
    found = not_now(sensors, Requirements())
    assert (found and found.reading) == reason


def test_the_owner_may_ask_for_more_or_less() -> None:
    strict = Requirements(only_charging=True, unmetered_only=True)
    on_battery, mobile = Sensors(100.0, False, None, None), Sensors(None, None, None, True)
    assert not_now(on_battery, Requirements()) is None
    found = not_now(on_battery, strict)
    assert found is not None
    assert (found.condition, found.reading) == ("not charging", "battery at 100% and not charging")
    found = not_now(mobile, strict)
    assert found is not None
    assert found.reading == "the link is metered"
    assert not_now(Sensors(20.0, False, 95.0, None), Requirements(battery_reserve=10, max_temperature=100)) is None


def test_what_the_server_may_know_has_no_number() -> None:
    requirements = Requirements(unmetered_only=True)
    for sensors in (Sensors(41.0, False, None, None), Sensors(None, None, 97.0, None), Sensors(None, None, None, True)):
        found = not_now(sensors, requirements)
        assert found is not None
        assert not any(letter.isdigit() for letter in found.condition)


@pytest.mark.parametrize(("interface", "metered"), [("wwan0", True), ("wlan0", False), ("gone", None)])
def test_a_default_route_over_mobile_broadband_is_metered(tmp_path: Path, interface: str, metered: bool | None) -> None:
    for name, kind in (("wwan0", "wwan"), ("wlan0", "wlan")):
        (tmp_path / "sys/class/net" / name).mkdir(parents=True)
        (tmp_path / "sys/class/net" / name / "uevent").write_text(f"DEVTYPE={kind}\nINTERFACE={name}\n")
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/route").write_text(ROUTES.format(interface=interface))
    assert sense(tmp_path).metered is metered


def test_what_the_system_does_not_expose_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    battery = type("Battery", (), {"percent": 41, "power_plugged": False})()
    sensor = type("Sensor", (), {"current": 71.5})()
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: {"soc": [sensor]}, raising=False)
    assert sense(tmp_path) == Sensors(41.0, False, 71.5, None)
    monkeypatch.delattr(psutil, "sensors_battery")
    monkeypatch.delattr(psutil, "sensors_temperatures")
    assert sense(tmp_path) == Sensors(None, None, None, None)
