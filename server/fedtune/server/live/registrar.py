"""Registration of devices before they are asked to train: each one states its software, roster and plan.

Before a round the client manager waits for enough registered devices, and before the first round for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from fedtune.core.errors import PeerError
from fedtune.core.host.clock import SYSTEM_CLOCK, Clock
from fedtune.core.job.secure_cohorts import secure_cohort_problems
from fedtune.core.job.settings import Job
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.protocol.messages import HEADER_BYTES, decode, encode
from fedtune.core.protocol.registration import (
    ACTION,
    PROTOCOL_VERSION,
    Registration,
    RegistrationReply,
    check_plan,
)
from fedtune.core.text import counted, one_line
from fedtune.flower.superlink import NodeState
from fedtune.server.live.enrolled_devices import Devices
from fedtune.server.live.status_board import Board, DeviceState, PlanStatus
from fedtune.strategies.cohorts.selection import cohort_size

REGISTRATION_SECONDS = 30.0
REFUSED_SECONDS = 60.0  # the time until a refused device is asked again


class AskableGrid(Protocol):
    """The part of a run's grid that registration needs; nodes are numbers."""

    def drop_late(self) -> set[int]:
        """Discards late answers; returns the nodes that still owe one."""

    def sitting_out(self) -> set[int]:
        """Returns the nodes that refused a message because they sit out, since the last call."""

    def ask(
        self, nodes: Iterable[int], action: str, group: str, payload: bytes, seconds: float
    ) -> dict[int, bytes | PeerError]:
        """Sends all nodes the same request; returns node -> payload, or the reason why there is none."""


@dataclass(frozen=True)
class _Exclusion:
    """The reason why an online device is not asked to train, and since when on the monotonic clock."""

    state: DeviceState
    since: float


class Registrar:
    """Registers devices for a job, and keeps their answers.

    Args:
        board: the status board, which shows their answers.
        nodes: the devices as the SuperLink sees them.
        devices: the enrolled devices.
    """

    def __init__(
        self,
        board: Board,
        nodes: Callable[[], list[NodeState]],
        devices: Callable[[], Devices],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.board, self._clock = board, clock
        self._nodes, self._devices = nodes, devices
        self._job: JobManifest | None = None
        self._registered: dict[int, int] = {}
        self._left_out: dict[int, _Exclusion] = {}
        self.tiers: dict[str, int] = {}
        """Device -> the number of rank indices that its plan trains, for devices registered for the current job."""
        self.seconds: dict[str, float] = {}
        """Device -> its predicted seconds for a round of the current job."""

    def begin(self, job: JobManifest) -> None:
        """Begins a job, for which every device registers again."""
        self.forget()
        self.tiers.clear()
        self.seconds.clear()
        self._job = job

    def forget(self) -> None:
        """Forgets all registrations, since devices have other node numbers in a new SuperLink."""
        self._registered.clear()
        self._left_out.clear()

    @property
    def left_out(self) -> int:
        """Returns the number of devices that refuse or sit out, and are not asked to train."""
        return len(self._left_out)

    def state(self, node: NodeState) -> DeviceState:
        """Returns the state of a device in words."""
        if not node.online:
            return "offline"
        left_out = self._left_out.get(node.node_id)
        return left_out.state if left_out else "online"

    def present(self, grid: AskableGrid) -> dict[str, int]:
        """Returns the devices that are online and free, speak this protocol, and hold the newest fleet log."""
        for node_id in grid.sitting_out():
            self._registered.pop(node_id, None)  # it registers again before the next round
        names = {key: name for name, key in self._devices().node_keys.items()}
        busy = grid.drop_late()
        online = {
            names[node.public_key]: node.node_id
            for node in self._nodes()
            if node.online and node.public_key in names and node.node_id not in busy
        }
        newest = self._devices()
        ask = {
            name: node_id
            for name, node_id in online.items()
            if self._registered.get(node_id, -1) < newest.fleet.number
            and (
                node_id not in self._left_out
                or self._clock.monotonic() - self._left_out[node_id].since >= REFUSED_SECONDS
            )
        }
        self._ask(grid, ask, newest)
        return {
            name: node_id
            for name, node_id in online.items()
            if self._registered.get(node_id, -1) >= newest.fleet.number
        }

    def _ask(self, grid: AskableGrid, nodes: dict[str, int], devices: Devices) -> None:
        job = self._job
        assert job is not None
        software = version("fedtune")
        registration = encode(Registration(PROTOCOL_VERSION, software, job.data, devices.log))
        names = {node_id: name for name, node_id in nodes.items()}
        for node_id, reply in grid.ask(names, ACTION, "registration", registration, REGISTRATION_SECONDS).items():
            try:
                if isinstance(reply, PeerError):
                    raise reply
                answer = decode(reply, RegistrationReply, limit=HEADER_BYTES)
                check_plan(answer, job.terms.base, job.terms.job.training.weights)
            except PeerError as error:
                self._refused(names[node_id], node_id, error)
            else:
                self._take(names[node_id], node_id, answer)

    def _refused(self, name: str, node_id: int, error: PeerError) -> None:
        self._left_out[node_id] = _Exclusion("refused", self._clock.monotonic())
        self.board.device(name, state="refused", dropped=str(error)[:300])
        self.board.problem(f"device {name} is left out: {error}")

    def _take(self, name: str, node_id: int, answer: RegistrationReply) -> None:
        hardware = f"{counted(answer.cores, 'core')}, {answer.memory_mb} MB"
        if answer.accelerator:
            hardware += f", {one_line(answer.accelerator)}"
        plan = PlanStatus(answer.rank, answer.weights, answer.sequence_length, answer.peak_mb, answer.seconds)
        self.board.device(name, software=one_line(answer.software), hardware=hardware, plan=plan, state="online")
        if answer.sits_out:
            self._left_out[node_id] = _Exclusion("sits out", self._clock.monotonic())
            self.board.device(name, state="sits out", dropped=f"sits out: {one_line(answer.sits_out)}")
            return
        self._registered[node_id] = answer.fleet_number
        self._left_out.pop(node_id, None)
        self.tiers[name], self.seconds[name] = answer.rank, answer.seconds


MAX_LEAST = 1000  # the most devices that a round may need
_POLL_SECONDS = 0.2


class ClientManager:
    """The population of a run's rounds.

    Args:
        grid: the run's grid.
        registrar: knows the devices that may be asked.
        known: the devices in the others' roster; one that is enrolled during a job takes part in the next.
        wait_seconds: how long the first round waits for all devices.
    """

    def __init__(
        self,
        grid: AskableGrid,
        registrar: Registrar,
        job: Job,
        known: set[str],
        wait_seconds: float,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._grid, self._registrar, self._job, self._known, self._clock = grid, registrar, job, known, clock
        self._until = clock.monotonic() + wait_seconds

    def __call__(self, grid: object) -> dict[str, int]:
        """Waits until there are devices enough for a round, and returns device -> node."""
        del grid  # it is the grid of the constructor
        board = self._registrar.board
        while True:
            present = {name: node for name, node in self._registrar.present(self._grid).items() if name in self._known}
            everyone = len(present) == len(self._known) or self._clock.monotonic() >= self._until
            if everyone and self._enough(len(present)):
                self._until = 0.0  # later rounds wait only for as many devices as they need
                board.working(state="training")
                return present
            least = next((count for count in range(len(present), MAX_LEAST) if self._enough(count)), MAX_LEAST)
            wanted = least if self._clock.monotonic() >= self._until else max(least, len(self._known))
            left_out = self._registrar.left_out
            unwilling = f", {left_out} more refuse or sit out" if left_out else ""
            board.working(state=f"waiting for devices: {len(present)} of {wanted} are there{unwilling}")
            self._clock.sleep(_POLL_SECONDS)

    def _enough(self, present: int) -> bool:
        """Returns whether a round with this many devices can give an aggregate."""
        settings = self._job.federation
        if present < settings.minimum_clients:
            return False
        if not self._job.secure_aggregation.enabled:
            return True
        return not secure_cohort_problems(self._job, cohort_size(settings.clients_per_round, present))
