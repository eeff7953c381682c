"""A live device's side without a server: its answers to messages, its memory, and its sensors' readings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from live_helpers import Fleet
from one_backend import Only
from owner import owner_of

from fedtune.client.live.device_home import CALIBRATIONS, ClientHome
from fedtune.client.live.device_status import DeviceReport
from fedtune.client.live.registered_device import RegisteredDevice
from fedtune.client.plan.calibration import CalibrationStore
from fedtune.client.plan.device_plan import DevicePlanner
from fedtune.client.plan.eligibility import Sensors
from fedtune.client.plan.planned_work import PlannedWork
from fedtune.client.plan.planner import RESERVE
from fedtune.client.torch.torch_backend import TorchBackend
from fedtune.core.errors import PeerError
from fedtune.core.host.clock import SYSTEM_CLOCK
from fedtune.core.job.job_file import load_job
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.protocol.messages import Refusal, Request, decode, encode
from fedtune.core.protocol.registration import ACTION, PROTOCOL_VERSION, Registration, RegistrationReply
from fedtune.demo import JOB
from fedtune.server.fleet.signing import sign_job
from fedtune.server.live.enrolled_devices import Devices


def manifest(fleet: Fleet, *, secure: bool = True) -> JobManifest:
    job = load_job(JOB, ["adapter.kind=lora", f"secure_aggregation.enabled={json.dumps(secure)}"])
    return sign_job(owner_of(fleet.home).key, job, "job")


@dataclass
class Device:
    """A device's side without a server: its answers, its memory, and its sensors' readings."""

    work: RegisteredDevice
    planned: PlannedWork
    readings: list[Sensors]

    def ask(self, kind: str, *parts: bytes) -> bytes | Refusal:
        return self.work.answer(Request(kind, "1", parts))

    def refusal(self, kind: str, *parts: bytes) -> Refusal:
        outcome = self.ask(kind, *parts)
        assert isinstance(outcome, Refusal)
        return outcome

    def register(self, fleet: Fleet, *, secure: bool = True) -> RegistrationReply:
        """Returns the device's reply to a registration.

        Raises:
            PeerError: the device refuses; the message has the reason.
        """
        roster = Devices.load(fleet.home).log
        outcome = self.ask(
            ACTION, encode(Registration(PROTOCOL_VERSION, "0.1", manifest(fleet, secure=secure).data, roster))
        )
        if isinstance(outcome, Refusal):
            raise PeerError(outcome.reason)
        return decode(outcome, RegistrationReply)


class Warm(TorchBackend):
    """A backend in a process that needs no warm-up."""

    def warm_up(self) -> None:
        pass


def device_of(fleet: Fleet, name: str, reserve: float = RESERVE, now: Callable[[], float] = time.time) -> Device:
    home = ClientHome(fleet.client_home(name))
    report = DeviceReport(home.path, name, home.config.server, lambda line: None, SYSTEM_CLOCK)
    planner = DevicePlanner(Only(Warm()), CalibrationStore(home.path / CALIBRATIONS), reserve=reserve)
    planned = PlannedWork(tuple(map(Path, home.config.bases)), Path(home.config.data), planner)
    readings = [Sensors(None, None, None, None)]
    return Device(RegisteredDevice(home, planned, report, lambda: readings[-1], now), planned, readings)
