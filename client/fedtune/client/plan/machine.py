"""The probe of this machine: usable memory, cores, instruction sets, GPU, disk, battery, temperature.

    machine = probe()

In a container a process may not use all of the machine's memory: the tightest control group among its ancestors sets
the limit. Values that a system does not expose are None, never a guess.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from fedtune.client.plan.eligibility import Sensors

# The instruction sets that decide the speed of low-precision products.
INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "bf16",
    "i8mm",
    "sve",
)
_DEFAULT_ROUTE = "00000000"
_MOBILE_BROADBAND = "DEVTYPE=wwan"
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 for "none"


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Args:
        total: bytes of its memory.
        free: bytes of it that are unused.
        capability: CUDA compute capability, e.g. (9, 0).
    """

    name: str
    total: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """The result of the probe; bytes, degrees Celsius, percent.

    Args:
        memory_total: memory of the machine, or of the tightest control group.
        memory_free: memory that this process could still take.
        memory_source: source of both: "machine" or "control group PATH".
        cores: usable cores, limited by the control group's CPU quota; may be a fraction.
        battery: charge in percent; None without a battery.
        charging: whether it is plugged in; None without a battery.
        temperature: temperature of the hottest sensor.
    """

    processor: str
    architecture: str
    memory_total: int
    memory_free: int
    memory_source: str
    cores: float
    instructions: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    disk_free: int
    battery: float | None
    charging: bool | None
    temperature: float | None


def probe(folder: Path = Path(), system: Path = Path("/"), gpus: tuple[Gpu, ...] = ()) -> Machine:
    """Probes the machine.

    Args:
        gpus: the GPUs on which a training library computes; only such a library knows them.
        folder: folder whose free disk space is counted.
        system: root under which /proc and /sys are read.
    """
    memory = psutil.virtual_memory()
    total, free, source = int(memory.total), int(memory.available), "machine"
    for group, limit, used in control_group_memory(system):
        if limit - used < free:
            free, source = max(limit - used, 0), f"control group {group}"
        total = min(total, limit)
    left, charging = _battery()
    return Machine(
        processor=_processor(system),
        architecture=platform.machine(),
        memory_total=total,
        memory_free=free,
        memory_source=source,
        cores=_cores(system),
        instructions=_instructions(system),
        gpus=gpus,
        disk_free=int(psutil.disk_usage(str(folder.absolute())).free),
        battery=left,
        charging=charging,
        temperature=_temperature(),
    )


def sense(system: Path = Path("/")) -> Sensors:
    """Reads battery, temperature and link, the values that change while a device serves.

    Args:
        system: root under which /proc and /sys are read.
    """
    left, charging = _battery()
    return Sensors(left, charging, _temperature(), _metered(system))


def control_group_memory(system: Path = Path("/")) -> Iterator[tuple[str, int, int]]:
    """Yields every control group above this process that limits its memory: (name, limit, used without file cache).

    Version 2 (one tree) and version 1 (a tree for memory). Inside a container a group's own path is often not visible
    while its files lie at the root of the mount, so both places are read.
    """
    for hierarchy, path in _control_groups(system):
        if hierarchy == "":
            mounts = [system / "sys/fs/cgroup", system / "sys/fs/cgroup/unified"]
            limit_file, used_file, cache_key = "memory.max", "memory.current", "inactive_file"
        elif "memory" in hierarchy.split(","):
            mounts = [system / "sys/fs/cgroup" / hierarchy, system / "sys/fs/cgroup/memory"]
            limit_file, used_file, cache_key = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        for mount in dict.fromkeys(mounts):
            for folder in _upwards(mount, path):
                limit, used = _number(folder / limit_file), _number(folder / used_file)
                if limit is not None and used is not None and limit < _NO_LIMIT:
                    cache = _statistic(folder / "memory.stat", cache_key)
                    yield f"/{folder.relative_to(mount)}".replace("/.", "/"), limit, max(used - cache, 0)


def _control_groups(system: Path) -> list[tuple[str, str]]:
    """Returns (controllers, path) pairs of this process; version 2 has "" for controllers."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    parts = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return [(controllers, path) for _, controllers, path in parts]


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    folder = mount / path.lstrip("/")
    while folder != mount and mount in folder.parents:
        yield folder
        folder = folder.parent
    yield mount


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # missing, or "max"
        return None


def _statistic(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)


def _cores(system: Path) -> float:
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for hierarchy, path in _control_groups(system):
        if hierarchy == "":
            for folder in _upwards(system / "sys/fs/cgroup", path):
                quota, _, period = _text(folder / "cpu.max").partition(" ")
                if quota.isdigit() and period.strip().isdigit() and int(period):
                    cores = min(cores, int(quota) / int(period))
        elif "cpu" in hierarchy.split(","):
            for folder in _upwards(system / "sys/fs/cgroup/cpu", path):
                share, length = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
                if share and share > 0 and length:
                    cores = min(cores, share / length)
    return cores


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cpuinfo(system: Path, *keys: str) -> str:
    for line in _text(system / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _processor(system: Path) -> str:
    model = _text(system / "proc/device-tree/model").strip("\x00\n")
    return model or _cpuinfo(system, "model name", "Hardware") or platform.processor() or platform.machine()


def _instructions(system: Path) -> tuple[str, ...]:
    found = set(_cpuinfo(system, "flags", "Features").split())
    return tuple(name for name in INSTRUCTION_SETS if name in found)


def _battery() -> tuple[float | None, bool | None]:
    read = getattr(psutil, "sensors_battery", None)  # not on every platform
    battery = read() if read else None
    return (None, None) if battery is None else (float(battery.percent), battery.power_plugged)


def _temperature() -> float | None:
    read = getattr(psutil, "sensors_temperatures", None)
    sensors = read() if read else {}
    return max((float(reading.current) for group in sensors.values() for reading in group), default=None)


def _metered(system: Path) -> bool | None:
    """Returns whether the interface of the default route is mobile broadband; None without a visible route."""
    routes = [line.split() for line in _text(system / "proc/net/route").splitlines()[1:]]
    interface = next((route[0] for route in routes if route[1:2] == [_DEFAULT_ROUTE]), None)
    properties = _text(system / "sys/class/net" / (interface or "none") / "uevent").splitlines()
    return _MOBILE_BROADBAND in properties if properties else None
