"""The probe finds the memory and cores that a process may use, rather than those of the machine."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from fedtune.client.plan.machine import control_group_memory, probe

MB = 1 << 20


def write(system: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = system / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return system


def test_the_tightest_control_group_on_the_way_up_decides(tmp_path: Path) -> None:
    system = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/memory.max": "max\n",
            "sys/fs/cgroup/pod/box/memory.current": "5\n",
            "sys/fs/cgroup/pod/memory.max": f"{100 * MB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{60 * MB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 7\ninactive_file {20 * MB}\n",
            "sys/fs/cgroup/pod/box/cpu.max": "50000 100000\n",
        },
    )
    machine = probe(system=system)
    assert (machine.memory_free, machine.memory_total) == (60 * MB, 100 * MB)
    assert machine.memory_source == "control group /pod"
    assert machine.cores == 0.5


def test_version_1_of_control_groups_is_read_too(tmp_path: Path) -> None:
    system = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:devices:/a\n4:memory:/a\n2:cpu,cpuacct:/a\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{64 * MB}",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{4 * MB}",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "25000",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
        },
    )
    assert list(control_group_memory(system)) == [("/a", 64 * MB, 4 * MB)]
    assert probe(system=system).cores == 0.25


def test_in_a_container_the_limit_lies_at_the_root_of_the_mount(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/somewhere/outside\n",
        "sys/fs/cgroup/memory.max": f"{32 * MB}",
        "sys/fs/cgroup/memory.current": f"{2 * MB}",
    }
    assert probe(system=write(tmp_path, files)).memory_free == 30 * MB


def test_without_control_groups_the_machine_decides(tmp_path: Path) -> None:
    machine = probe(system=tmp_path)
    assert machine.memory_source == "machine"
    assert machine.memory_total == psutil.virtual_memory().total
    assert 0 < machine.memory_free <= machine.memory_total


def test_instruction_sets_are_those_that_the_processor_states(tmp_path: Path) -> None:
    system = write(tmp_path, {"proc/cpuinfo": "model name\t: Chip 9\nflags\t\t: fpu avx2 amx_bf16 avx512_bf16\n"})
    machine = probe(system=system)
    assert machine.processor == "Chip 9"
    assert machine.instructions == ("avx2", "avx512_bf16", "amx_bf16")
    board = write(
        tmp_path / "board", {"proc/cpuinfo": "Features : fp asimd asimdhp\n", "proc/device-tree/model": "Pi 5\x00"}
    )
    assert (probe(system=board).processor, probe(system=board).instructions) == ("Pi 5", ("asimd", "asimdhp"))


def test_battery_and_temperature_are_read_where_the_system_exposes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    battery = type("Battery", (), {"percent": 41, "power_plugged": False})()
    sensor = type("Sensor", (), {"current": 71.5})()
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: {"soc": [sensor]}, raising=False)
    machine = probe()
    assert (machine.battery, machine.charging, machine.temperature) == (41.0, False, 71.5)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    machine = probe()
    assert (machine.battery, machine.charging, machine.temperature) == (None, None, None)
