"""A simulated fleet: every client is a device of some kind, and rounds take time on a virtual clock.

    devices = SimulatedFleet(job, load_fleet(path), names, shape)
    clients = Clients(len(names), devices.rank, devices.predicted, devices.present, virtual_time=True)
    federation = assemble(job, base, layout, clients)
    device = Device(..., share=devices.work)
    grid = InProcessGrid(executor, node_ids, VirtualRounds(devices, clients, run_directory / "virtual.jsonl"))

Eligibility, dropouts and durations are drawn from seed, round and client alone, so runs are reproducible, also after a
resume. A client whose update would not be used does not train: a straggler costs virtual time, not real time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.client.plan.planner import (
    RESERVE,
    Constraints,
    NoPlanError,
    Plan,
    choose,
    download_bytes,
    upload_bytes,
)
from fedtune.core.adapter.tiers import tier_for
from fedtune.core.errors import JobError
from fedtune.core.job.device_kinds import Fleet, Kind
from fedtune.core.job.settings import Job
from fedtune.core.protocol.messages import SECURE_EXCHANGES, TRAIN, TrainRequest
from fedtune.core.round_timing import Course, done_share, round_deadline, run_clock
from fedtune.core.secagg.graph import part
from fedtune.core.seeds import generator
from fedtune.flower.in_process_grid import Failure, Outgoing
from fedtune.model.shape import ModelShape
from fedtune.server.run_directory import read_virtual
from fedtune.server.run_files import storage, write_text
from fedtune.strategies.cohorts.selection import cohort_size

PROGRAM_BYTES = 400_000_000  # memory of a training process before it loads a model


class LateError(ConnectionError):
    """The device vanished, or had not answered when the round closed on the virtual clock."""


@dataclass(frozen=True)
class VirtualRound:
    """A round on the virtual clock.

    Args:
        seconds: client -> when its update arrived; None for a client that vanished.
        shares: client -> the share of its local work that it did.
        vanishes: client -> the exchange of the round before which it vanishes.
    """

    course: Course
    deadline: float | None
    seconds: Mapping[str, float | None]
    shares: Mapping[str, float]
    vanishes: Mapping[str, str]


class SimulatedFleet:
    """The clients of a simulation as devices of a fleet.

    Args:
        names: the names of all clients.
        shape: the base model's shape; kinds of devices that cannot hold it sit out.

    Raises:
        JobError: the model fits no kind of device.
    """

    def __init__(self, job: Job, fleet: Fleet, names: Sequence[str], shape: ModelShape) -> None:
        self._job = job
        self.kinds = fleet.assign(names, job.training.seed)
        self.plans, self.refusals = _plans(job, fleet, shape)
        if not self.plans:
            raise JobError([f"the fleet has no kind that the model fits: {'; '.join(self.refusals.values())}"])
        self.predicted = {
            name: _seconds(job, kind, shape, self.plans[kind.name].tier)
            for name, kind in self.kinds.items()
            if kind.name in self.plans
        }

    @property
    def keeps_late(self) -> bool:
        """True if the job uses late updates."""
        return self._job.federation.late == "next"

    def rank(self, name: str) -> int:
        """Returns the number of rank indices that a client trains by its kind's plan; 0 for a kind that sits out."""
        plan = self.plans.get(self.kinds[name].name)
        return plan.tier if plan else 0

    def sequence_length(self, name: str, asked: int) -> int:
        """Returns the number of tokens to which a client truncates its examples.

        Only this and the rank of its kind's plan change an update: smaller micro-batches and activation checkpointing
        give the same gradient later, which the virtual clock takes into account.
        """
        plan = self.plans.get(self.kinds[name].name)
        return min(asked, plan.sequence_length) if plan else asked

    def present(self, number: int, names: Sequence[str]) -> list[str]:
        """Returns the clients that can be asked in a round; if none is eligible, all clients that the model fits."""
        able = [name for name in names if name in self.predicted]
        return [name for name in able if not self.absence(number, name)] or able

    def absence(self, number: int, name: str) -> str | None:
        """Returns the reason why a client cannot be asked in a round, or None."""
        random = self._random("present", number, name)
        for what, chance in self.kinds[name].eligibility.items():
            if float(random.random()) >= chance:
                return f"not {what}"
        return None

    def work(self, name: str, request: TrainRequest) -> float:
        """Returns the share of a request's local work that a client does."""
        return self.share(name, request.round)

    def share(self, name: str, number: int) -> float:
        """Returns the share of a round's local work that a client does."""
        return done_share(self.predicted[name], self._deadline(number))

    def round(self, number: int, cohort: Sequence[str]) -> VirtualRound:
        """Simulates a round with this cohort on the virtual clock."""
        deadline, secure = self._deadline(number), self._job.secure_aggregation
        shares = {name: self.share(name, number) for name in cohort}
        seconds = {name: self._arrival(number, name, shares[name]) for name in cohort}
        asked = self._job.federation.clients_per_round
        wanted = cohort_size(asked, len(self.kinds)) if deadline is not None else len(cohort)
        least = len(cohort) - part(secure.max_dropout, len(cohort)) if secure.enabled else 0
        before = SECURE_EXCHANGES[: SECURE_EXCHANGES.index(TRAIN) + 1] if secure.enabled else (TRAIN,)
        vanishes = {
            name: before[int(self._random("vanish", number, name).integers(len(before)))]
            for name, arrival in seconds.items()
            if arrival is None
        }
        return VirtualRound(run_clock(seconds, wanted, deadline, least), deadline, seconds, shares, vanishes)

    def _deadline(self, number: int) -> float | None:
        if self._job.federation.selection == "uniform":
            return None
        return round_deadline([self.predicted[name] for name in self.present(number, sorted(self.kinds))])

    def _arrival(self, number: int, name: str, share: float) -> float | None:
        random, kind = self._random("course", number, name), self.kinds[name]
        vanishes = float(random.random()) < kind.failure_rate
        return None if vanishes else self.predicted[name] * share * float(random.lognormal(0.0, kind.jitter))

    def _random(self, purpose: str, number: int, name: str) -> Any:
        return generator(self._job.training.seed, purpose, number, name)


class VirtualRounds:
    """The messages of a round that fail by the virtual clock; all others are delivered as usual.

    Args:
        clients: node -> client name.
        log: a file that gets one object a round.
    """

    def __init__(self, devices: SimulatedFleet, clients: Mapping[int, str], log: Path) -> None:
        self._devices = devices
        self._clients = clients
        self._log = log
        self._rounds: dict[int, VirtualRound] = {}

    def __call__(self, messages: Sequence[Outgoing]) -> Sequence[Failure | None]:
        """Returns the errors of those among these messages, sent together, that fail."""
        if not messages or messages[0].action not in SECURE_EXCHANGES:
            return [None] * len(messages)
        number = int(messages[0].group)
        if number not in self._rounds:
            cohort = [self._clients[message.node] for message in messages]
            self._rounds = {number: self._devices.round(number, cohort)}
            self._write(number)
        return [self._failure(message, self._rounds[number]) for message in messages]

    def _failure(self, message: Outgoing, virtual: VirtualRound) -> Failure | None:
        name = self._clients[message.node]
        if message.action == virtual.vanishes.get(name):
            return Failure(LateError("vanished"))
        if message.action == TRAIN and name not in virtual.course.arrived:
            late = LateError(f"no answer after {virtual.course.seconds:.1f} virtual seconds")
            return Failure(late, works_on=self._devices.keeps_late)
        return None

    def _write(self, number: int) -> None:
        virtual = self._rounds[number]
        away = [self._devices.absence(number, name) for name in self._devices.predicted]
        line = {
            "round": number,
            "seconds": virtual.course.seconds,
            "deadline": virtual.deadline,
            "ineligible": dict(Counter(reason for reason in away if reason)),
            "clients": [
                {
                    "id": name,
                    "kind": self._devices.kinds[name].name,
                    "rank": self._devices.rank(name),
                    "seconds": seconds,
                    "share": virtual.shares[name],
                    "counts": name in virtual.course.arrived,
                }
                for name, seconds in virtual.seconds.items()
            ],
        }
        earlier = [old for old in read_virtual(self._log) if old["round"] < number]  # a resumed round is logged again
        with storage(self._log.parent):
            write_text(self._log, "".join(json.dumps(each) + "\n" for each in [*earlier, line]))


def _plans(job: Job, fleet: Fleet, shape: ModelShape) -> tuple[dict[str, Plan], dict[str, str]]:
    """Returns each kind's plan, and for each kind without one the reason.

    A plan's rank is the largest of the job's tiers whose upload takes at most its share of the deadline that the fleet
    would have if every client sent the full rank.
    """
    deadline = round_deadline(
        [_seconds(job, kind, shape, job.adapter.rank) for kind in fleet.kind for _ in range(kind.count)]
    )
    constraints = replace(Constraints.of(job, "fp32"), weights="auto", checkpointing=False, deadline=deadline)
    plans, refusals = {}, {}
    for kind in fleet.kind:
        budget = round(kind.memory_mb * 1e6 * (1 - RESERVE)) - PROGRAM_BYTES
        try:
            plan = choose(shape, replace(constraints, bandwidth_up=kind.uplink_kbit * 1000 / 8), budget)
        except NoPlanError as error:
            refusals[kind.name] = f"{kind.name}: {error}"
            continue
        if tier := tier_for(plan.tier, job.tiers):
            plans[kind.name] = replace(plan, tier=tier)
        else:
            refusals[kind.name] = f"{kind.name}: its link is for rank {plan.tier}; the job has the tiers {job.tiers}"
    return plans, refusals


def _seconds(job: Job, kind: Kind, shape: ModelShape, tier: int) -> float:
    """Predicts the seconds of a whole round's work."""
    tokens = job.training.steps * job.training.batch_tokens
    adapter = job.adapter
    up, down = upload_bytes(shape, tier, adapter.kind), download_bytes(shape, adapter.rank, adapter.kind)
    return kind.seconds(tokens, up, down)
