"""A device of the benchmark: the process of `fedtune client start`, which echoes, or records when it trains.

python benchmarks/live/device.py HOME echo
python benchmarks/live/device.py HOME FILE      # appends a line "begin end" to FILE for each time it trained
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fedtune.core.host.process import prepare_environment

prepare_environment()

import exchanges  # noqa: E402  # Flower reads the environment when it is imported

from fedtune.client.live.device_home import CALIBRATIONS, ClientHome  # noqa: E402
from fedtune.client.live.device_loop import DeviceLoop, Work  # noqa: E402
from fedtune.client.live.device_status import DeviceReport  # noqa: E402
from fedtune.client.live.fleet_link import FleetLink  # noqa: E402
from fedtune.client.live.registered_device import RegisteredDevice  # noqa: E402
from fedtune.client.plan.calibration import CalibrationStore  # noqa: E402
from fedtune.client.plan.device_plan import this_device  # noqa: E402
from fedtune.client.plan.planned_work import PlannedWork  # noqa: E402
from fedtune.core.host.clock import SYSTEM_CLOCK  # noqa: E402
from fedtune.core.protocol.messages import TRAIN, Refusal, Request  # noqa: E402


class Echo:
    """Work that answers with as many bytes as were asked for."""

    def answer(self, request: Request) -> bytes | Refusal:
        return exchanges.echoed(request.parts[0])

    def cannot_store(self, action: str, error: OSError) -> Refusal:
        return Refusal(f"{action}: {error}")

    def sent(self, action: str, size: int, seconds: float) -> None:
        """Ignores the link's speed."""


class Noting:
    """Work that records when it trains."""

    def __init__(self, work: RegisteredDevice, file: Path) -> None:
        self._work, self._file = work, file
        self.cannot_store, self.sent = work.cannot_store, work.sent

    def answer(self, request: Request) -> bytes | Refusal:
        began = time.time()
        try:
            return self._work.answer(request)
        finally:
            if request.action == TRAIN:
                with self._file.open("a") as file:
                    file.write(f"{began} {time.time()}\n")


def main() -> None:
    home, task = ClientHome(Path(sys.argv[1])), sys.argv[2]
    config = home.config
    with home.lock:
        report = DeviceReport(home.path, config.name, config.server, lambda line: print(line, flush=True), SYSTEM_CLOCK)
        work: Work = Echo()
        if task != "echo":
            bases = tuple(map(Path, config.bases))
            planner = this_device(CalibrationStore(home.path / CALIBRATIONS), report.show)
            planned = PlannedWork(bases, Path(config.data), planner)
            work = Noting(RegisteredDevice(home, planned, report), Path(task))
        DeviceLoop(home, FleetLink(config.server, home.authority, home.node_key), work, report).run()


if __name__ == "__main__":
    main()
