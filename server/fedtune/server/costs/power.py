"""The power of the machine that runs the rounds, from the job or from a meter.

    with meter_of(job) as meter:
        watts = meter.watts()           # mean since the last reading; None where it is not known

The meter is CodeCarbon (Courty et al. 2024), which reads RAPL and NVML where it may and models the rest. It runs in a
process of its own (`power_process`), so that it cannot disturb a run: a meter that fails, or is slow, leaves joules
out. It sees the whole machine, and so what else runs there.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from types import TracebackType
from typing import Protocol, Self, cast, get_args

from fedtune.core.errors import JobError, install_line
from fedtune.core.job.settings import Job
from fedtune.core.round_records import EnergySource

PACKAGE, EXTRA = "codecarbon", "energy"
PATIENCE_SECONDS = 10.0  # until a reading: CodeCarbon takes four seconds to look at the machine
MOST_WATTS = 1e6  # of one machine; a meter that reads more is broken
READING = b"\n"  # asks the process for a reading


class Meter(Protocol):
    """The interface of meters, which are context managers."""

    @property
    def source(self) -> EnergySource:
        """The source of readings: measured, estimated or stated."""

    def watts(self) -> float | None:
        """Returns the machine's mean power since the last reading, in watts; None where it is not known."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Stated:
    """The power that a job states, or none.

    Args:
        power: watts.
    """

    source: EnergySource = "stated"

    def __init__(self, power: float | None) -> None:
        self._power = power

    def watts(self) -> float | None:
        """Returns the power."""
        return self._power

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PowerProcess:
    """A meter in a process of its own.

    Args:
        command: the command of that process; it answers each byte on its input with a line of JSON.
        patience: seconds to wait for an answer.
    """

    def __init__(self, command: tuple[str, ...] = (), patience: float = PATIENCE_SECONDS) -> None:
        command = command or (sys.executable, "-m", "fedtune.server.costs.power_process")
        self.source: EnergySource = "estimated"
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )

    def watts(self) -> float | None:
        """Returns the mean power since the last reading; a process that fails once is not asked again."""
        if self._process is None:
            return None
        try:
            answer = json.loads(self._ask(self._process))
            watts, source = float(answer["watts"]), answer["source"]
            if not 0 <= watts <= MOST_WATTS or source not in get_args(EnergySource):
                raise ValueError(f"{watts} W")
        except (OSError, ValueError, TypeError, KeyError):
            self._end()
            return None
        self.source = cast(EnergySource, source)
        return watts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _ask(self, process: subprocess.Popen[bytes]) -> bytes:
        if process.stdin is None or process.stdout is None:
            raise OSError("the process has no pipes")
        process.stdin.write(READING)
        process.stdin.flush()
        line, end = b"", time.monotonic() + self._patience
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(end - time.monotonic(), 0.0))
            part = process.stdout.read1(4096) if ready else b""  # type: ignore[attr-defined]
            if not part:
                raise OSError("no answer")
            line += part
        return line

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # it has nothing to save; workers that were forked may hold its input open
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def meter_of(job: Job) -> Meter:
    """Returns the job's meter: the power that it states, or else the machine's, where the meter is installed."""
    if job.cost.watts is not None or find_spec(PACKAGE) is None:
        return Stated(job.cost.watts)
    return PowerProcess()


def check_energy(job: Job) -> None:
    """Checks that a budget has the joules that it needs.

    Raises:
        JobError: nothing would tell them.
    """
    if job.cost.watts is not None or find_spec(PACKAGE) is not None:
        return
    remedy = f"state the machine's power, cost.watts, or install a meter with: {install_line(EXTRA)}"
    problems = []
    if job.budget.joules is not None:
        problems.append(f"budget.joules is {job.budget.joules:g}, but nothing tells joules here; {remedy}")
    if job.budget.money is not None and job.cost.kwh is not None:
        problems.append(f"budget.money has the price cost.kwh in it, but nothing tells joules here; {remedy}")
    if problems:
        raise JobError(problems)
