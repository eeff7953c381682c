"""Who may be asked to train: devices are greeted first, and say what they run, hold and plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from flwr.app import Message

from fedtune.core.errors import PeerError
from fedtune.core.job.settings import DEFAULT_LOCAL_STEPS, Job
from fedtune.core.protocol.enrolment import SignedRoster
from fedtune.core.protocol.payloads import HEADER_BYTES, Base, decode, encode
from fedtune.core.protocol.registration import (
    ACTION,
    PROTOCOL_VERSION,
    SITS_OUT,
    Registration,
    RegistrationReply,
    Terms,
    check_plan,
)
from fedtune.core.round_records import ClientRecord, RoundRecord
from fedtune.core.text import one_line
from fedtune.flower.envelope import seal, unseal
from fedtune.flower.run_grid import RunGrid
from fedtune.flower.superlink import NodeState
from fedtune.server.live.enrolled_devices import Devices
from fedtune.server.live.status_board import Board, DeviceState, PlanStatus

REGISTRATION_SECONDS = 30.0
REFUSED_SECONDS = 60.0  # until a device that was refused is asked again


@dataclass(frozen=True)
class CurrentJob:
    """What devices are told of the job."""

    id: str
    secure: bool
    terms: Terms


@dataclass(frozen=True)
class _LeftOut:
    """Why a device that is online is not asked to train, and since when: time.monotonic()."""

    state: DeviceState
    since: float


class Registrar:
    """Greets devices, and keeps what they answered.

    Args:
        board: shows what they said.
        nodes: the devices as the SuperLink sees them.
        devices: who is enrolled.
    """

    def __init__(self, board: Board, nodes: Callable[[], list[NodeState]], devices: Callable[[], Devices]) -> None:
        self.board = board
        self._nodes, self._devices = nodes, devices
        self._job: CurrentJob | None = None
        self._registered: dict[int, int] = {}
        self._left_out: dict[int, _LeftOut] = {}
        self.tiers: dict[str, int] = {}
        """Device -> how many rank indices its plan trains, of those that the current job has greeted."""
        self.seconds: dict[str, float] = {}
        """Device -> what it predicts that a round of the current job takes it."""

    def begin(self, identifier: str, job: Job, base: Base) -> CurrentJob:
        """Greets everyone anew, for a registration also says which job is next."""
        self.forget()
        self.tiers.clear()
        self.seconds.clear()
        self._job = CurrentJob(identifier, job.secure_aggregation.enabled, terms_of(job, base))
        return self._job

    def forget(self) -> None:
        """The SuperLink began anew, and its devices have other numbers."""
        self._registered.clear()
        self._left_out.clear()

    @property
    def left_out(self) -> int:
        """How many devices were greeted and are not asked, for they refused or sit out."""
        return len(self._left_out)

    def state(self, node: NodeState) -> DeviceState:
        """What a device is doing, for people."""
        if not node.online:
            return "offline"
        left_out = self._left_out.get(node.node_id)
        return left_out.state if left_out else "online"

    def present(self, grid: RunGrid) -> dict[str, int]:
        """The devices that are online and free, speak this protocol, and hold the newest roster."""
        names = {key: name for name, key in self._devices().node_keys.items()}
        busy = grid.drop_late()
        online = {
            names[node.public_key]: node.node_id
            for node in self._nodes()
            if node.online and node.public_key in names and node.node_id not in busy
        }
        newest = self._devices().roster
        ask = {
            name: node_id
            for name, node_id in online.items()
            if self._registered.get(node_id, -1) < newest.version
            and (node_id not in self._left_out or time.monotonic() - self._left_out[node_id].since >= REFUSED_SECONDS)
        }
        self._ask(grid, ask, newest)
        return {
            name: node_id for name, node_id in online.items() if self._registered.get(node_id, -1) >= newest.version
        }

    def _ask(self, grid: RunGrid, nodes: dict[str, int], roster: SignedRoster) -> None:
        job = self._job
        assert job is not None
        software = version("fedtune")
        registration = seal(
            encode(Registration(PROTOCOL_VERSION, software, job.id, job.secure, job.terms, roster.to_bytes()))
        )
        messages = [Message(registration, node_id, ACTION, group_id="registration") for node_id in nodes.values()]
        names = {node_id: name for name, node_id in nodes.items()}
        for reply in grid.send_and_receive(messages, timeout=REGISTRATION_SECONDS):
            node_id = reply.metadata.src_node_id
            name = names[node_id]
            try:
                answer = decode(unseal(reply), RegistrationReply, limit=HEADER_BYTES)
                check_plan(answer, job.terms)
            except PeerError as error:
                self._left_out[node_id] = _LeftOut("refused", time.monotonic())
                self.board.device(name, state="refused", dropped=str(error)[:300])
                self.board.problem(f"device {name} is left out: {error}")
                continue
            hardware = f"{answer.cores} cores, {answer.memory_mb} MB"
            if answer.accelerator:
                hardware += f", {one_line(answer.accelerator)}"
            plan = PlanStatus(answer.rank, answer.weights, answer.sequence_length, answer.peak_mb, answer.seconds)
            self.board.device(name, software=one_line(answer.software), hardware=hardware, plan=plan, state="online")
            if answer.sits_out:
                self._left_out[node_id] = _LeftOut("sits out", time.monotonic())
                self.board.device(name, state="sits out", dropped=f"{SITS_OUT}: {one_line(answer.sits_out)}")
                continue
            self._registered[node_id] = answer.roster_version
            self._left_out.pop(node_id, None)
            self.tiers[name], self.seconds[name] = answer.rank, answer.seconds

    def client(self, record: ClientRecord) -> None:
        """Registers a device that sat out a round again before the next."""
        if record.dropped and SITS_OUT in record.dropped:
            nodes = {node.public_key: node.node_id for node in self._nodes()}
            self._registered.pop(nodes.get(self._devices().node_keys.get(record.id, b""), 0), None)

    def round(self, record: RoundRecord) -> None:
        """Registers nobody."""


def terms_of(job: Job, base: Base) -> Terms:
    """What devices must know of a job to plan for it."""
    training, deadline = job.training, job.federation.deadline
    return Terms(
        base,
        training.batch_tokens,
        0 if training.local_epochs else training.local_steps or DEFAULT_LOCAL_STEPS,
        training.local_epochs or 0.0,
        training.weights,
        training.precision,
        training.gradient_checkpointing,
        0.0 if deadline == "auto" else deadline,
    )
