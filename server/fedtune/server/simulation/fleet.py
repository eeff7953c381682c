"""A simulated fleet: every client is a device of some kind, and rounds pass on a virtual clock.

    devices = SimulatedFleet(job, load_fleet(path), names, shape)
    federation = replace(federation, selection=devices.selection(federation.selection))
    grid = FleetGrid(executor, node_ids, clients, devices, run_directory / "virtual.jsonl")

Who is present, who vanishes and how long each takes follows from seed, round and client alone, so a run repeats and a
resumed one goes on as it would have. Only what counts is trained: a straggler costs virtual time, not real time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from flwr.app import Message, MessageType

from fedtune.client.plan.planner import (
    BYTES_PER_PARAMETER_DOWN,
    RESERVE,
    NoPlanError,
    Plan,
    Wishes,
    choose,
    upload_bytes,
)
from fedtune.core.errors import JobError, PeerError
from fedtune.core.fleet import Fleet, Kind
from fedtune.core.job import DEFAULT_LOCAL_STEPS, Job
from fedtune.core.messages import TrainRequest, decode, encode
from fedtune.core.seeds import generator
from fedtune.model.shape import ModelShape
from fedtune.server.files import storage, write_text
from fedtune.server.simulation.grid import Executor, InProcessGrid
from fedtune.strategies.envelope import seal, unseal
from fedtune.strategies.selection import Selection
from fedtune.strategies.timed_selection import DeadlineSelection
from fedtune.strategies.virtual_clock import Course, round_deadline, run_clock, work_share

PROGRAM_BYTES = 400_000_000  # what a training process takes before it loads a model


class LateError(ConnectionError):
    """The device vanished, or had not answered when the round closed on the virtual clock."""


@dataclass(frozen=True)
class VirtualRound:
    """A round as the clock saw it.

    Args:
        seconds: client -> when its update arrived, None for one that vanished.
        shares: client -> the share of the local work it was given.
    """

    course: Course
    deadline: float | None
    seconds: Mapping[str, float | None]
    shares: Mapping[str, float]


class SimulatedFleet:
    """Clients as devices.

    Args:
        names: of all clients.
        shape: of the base model; kinds that it does not fit sit out.

    Raises:
        JobError: it fits none of the kinds.
    """

    def __init__(self, job: Job, fleet: Fleet, names: Sequence[str], shape: ModelShape) -> None:
        self._job = job
        self.kinds = fleet.assign(names, job.training.seed)
        self.plans, self.refusals = _plans(job, fleet, shape)
        if not self.plans:
            raise JobError([f"the fleet has no kind that the model fits: {'; '.join(self.refusals.values())}"])
        tokens = (job.training.local_steps or DEFAULT_LOCAL_STEPS) * job.training.batch_tokens
        up = upload_bytes(shape, job.adapter.rank)
        down = round(shape.adapter_parameters(job.adapter.rank) * BYTES_PER_PARAMETER_DOWN)
        self.predicted = {name: kind.seconds(tokens, up, down) for name, kind in self.kinds.items()}

    def present(self, number: int, names: Sequence[str]) -> list[str]:
        """Those of the clients that can be asked in a round; all that the model fits where nobody is there."""
        able = [name for name in names if self.kinds[name].name in self.plans]
        there = [name for name in able if self._random("present", number, name).random() < self._of(name).availability]
        return there or able

    def selection(self, inner: Selection) -> Selection:
        """The job's selection among those present."""
        if self._job.federation.selection == "deadline":
            inner = DeadlineSelection(self._wanted(len(self.kinds)), self._job.training.seed, self.predicted)
        return _AmongPresent(self, inner)

    def round(self, number: int, cohort: Sequence[str]) -> VirtualRound:
        """How a round with this cohort goes."""
        deadline = None
        if self._job.federation.selection == "deadline":
            deadline = round_deadline([self.predicted[name] for name in self.present(number, sorted(self.kinds))])
        shares = {name: 1.0 if deadline is None else work_share(self.predicted[name], deadline) for name in cohort}
        seconds = {name: self._seconds(number, name, shares[name]) for name in cohort}
        wanted = self._wanted(len(self.kinds)) if deadline is not None else len(cohort)
        return VirtualRound(run_clock(seconds, wanted, deadline), deadline, seconds, shares)

    def _seconds(self, number: int, name: str, share: float) -> float | None:
        random = self._random("course", number, name)
        vanishes = float(random.random()) < self._of(name).failure_rate
        return None if vanishes else self.predicted[name] * share * float(random.lognormal(0.0, self._of(name).jitter))

    def _of(self, name: str) -> Kind:
        return self.kinds[name]

    def _random(self, purpose: str, number: int, name: str) -> Any:
        return generator(self._job.training.seed, purpose, number, name)

    def _wanted(self, population: int) -> int:
        wanted = self._job.federation.clients_per_round
        return wanted if isinstance(wanted, int) else max(1, round(wanted * population))


class FleetGrid(InProcessGrid):
    """The grid of a simulated fleet: training requests run on the virtual clock, everything else as ever.

    Args:
        clients: node -> client name.
        log: a file that gets one object a round.
    """

    def __init__(
        self,
        executor: Executor,
        node_ids: Sequence[int],
        clients: Mapping[int, str],
        devices: SimulatedFleet,
        log: Path,
    ) -> None:
        super().__init__(executor, node_ids)
        self._clients = clients
        self._devices = devices
        self._log = log
        self._rounds: dict[int, VirtualRound] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hands over what will arrive in time, and lets the rest fail."""
        waiting = list(messages)
        if not waiting or waiting[0].metadata.message_type != MessageType.TRAIN:
            return super().push_messages(waiting)
        number = int(waiting[0].metadata.group_id)
        if number not in self._rounds:
            cohort = [self._clients[message.metadata.dst_node_id] for message in waiting]
            self._rounds = {number: self._devices.round(number, cohort)}
            self._write(number)
        return [self._push(message, self._rounds[number]) for message in waiting]

    def _push(self, message: Message, virtual: VirtualRound) -> str:
        name = self._clients[message.metadata.dst_node_id]
        if name in virtual.course.arrived:
            (message_id,) = super().push_messages([_with_share(message, virtual.shares[name])])
            return message_id
        vanished = virtual.seconds.get(name) is None
        reason = "vanished" if vanished else f"not there after {virtual.course.seconds:.1f} virtual seconds"
        return self.fail(message, LateError(reason))

    def _write(self, number: int) -> None:
        virtual = self._rounds[number]
        line = {
            "round": number,
            "seconds": virtual.course.seconds,
            "deadline": virtual.deadline,
            "clients": [
                {
                    "id": name,
                    "kind": self._devices.kinds[name].name,
                    "seconds": seconds,
                    "share": virtual.shares[name],
                    "counts": name in virtual.course.arrived,
                }
                for name, seconds in virtual.seconds.items()
            ],
        }
        earlier = [old for old in read_virtual(self._log) if old["round"] < number]  # a resumed round is written anew
        with storage(self._log.parent):
            write_text(self._log, "".join(json.dumps(each) + "\n" for each in [*earlier, line]))


def read_virtual(path: Path) -> list[dict[str, Any]]:
    """The virtual rounds that a run has logged; a line that a crash cut off is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@dataclass(frozen=True)
class _AmongPresent:
    devices: SimulatedFleet
    inner: Selection

    def cohort(self, round_number: int, population: Sequence[str]) -> list[str]:
        return self.inner.cohort(round_number, self.devices.present(round_number, sorted(population)))


def _plans(job: Job, fleet: Fleet, shape: ModelShape) -> tuple[dict[str, Plan], dict[str, str]]:
    """Kind -> its plan, and kind -> why it has none."""
    training = job.training
    wishes = Wishes(
        job.model.quantization,
        "fp32",
        job.adapter.rank,
        job.data.sequence_length,
        job.data.sequence_length,
        training.batch_tokens,
        training.local_steps or DEFAULT_LOCAL_STEPS,
    )
    plans, refusals = {}, {}
    for kind in fleet.kind:
        try:
            plans[kind.name] = choose(shape, wishes, round(kind.memory_mb * 1e6 * (1 - RESERVE)) - PROGRAM_BYTES)
        except NoPlanError as error:
            refusals[kind.name] = f"{kind.name}: {error}"
    return plans, refusals


def _with_share(message: Message, share: float) -> Message:
    """The message with as many local steps as the device can do in time."""
    if share >= 1.0:
        return message
    try:
        request = decode(unseal(message), TrainRequest)
    except PeerError:  # another exchange of the round
        return message
    work = request.work
    if work.local_steps:
        work = msgspec.structs.replace(work, local_steps=max(1, round(share * work.local_steps)))
    else:
        work = msgspec.structs.replace(work, local_epochs=share * work.local_epochs)
    content = seal(encode(msgspec.structs.replace(request, work=work)))
    metadata = message.metadata
    return Message(content, metadata.dst_node_id, metadata.message_type, group_id=metadata.group_id)
