"""The translation of a round into messages: the plan of the round, and the payloads of its requests.

    plan = plan_round(federation, state, population)
    requests = Requests(broadcast, state.held, partial(train_request, federation, state, plan), plan.tiers)
    data = requests.payload(name)

A request is the same for all clients that start from the same version of the adapter and train the same tier, so it is
serialised once for each such pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedtune.core.adapter.layout import Factors, Vector, factor_letters
from fedtune.core.adapter.tiers import RankSlice
from fedtune.core.codec.downlink import FIRST
from fedtune.core.codec.uplink import Compression, FactorTerms, factor_terms, round_slices
from fedtune.core.job.settings import Job
from fedtune.core.manifest.round_terms import clip_within, scheduled_learning_rate, work_of_round
from fedtune.core.privacy.budget import certainly_noised, rho_of_round
from fedtune.core.protocol.messages import (
    PROTOCOL_VERSION,
    Downlink,
    Payload,
    TrainRequest,
    Uplink,
    encode,
)
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.cohorts.grouping import Grouping, cut_cohort
from fedtune.strategies.cohorts.tier_assignment import TierAssignment, all_alike, assign_tiers
from fedtune.strategies.federation import Federation, FederationState
from fedtune.strategies.schedule import Closing

NO_TIERS: Mapping[str, int] = {}


@dataclass(frozen=True)
class RoundPlan:
    """The plan of a round.

    Args:
        number: the round's number, counted from 1.
        factors: the factors that the round trains.
        assignment: the cohort and the tier of each of its clients.
        tiers: client that is asked -> the tier it trains; 0 where all clients train the whole adapter.
        grouping: the groups of the clients that are asked, each with a sum of its own under secure aggregation.
        uplink: settings by which updates travel.
        terms: the codec's terms, of all slices.
        slices: slices of the rank indices; none where all clients train the whole adapter.
        closing: condition under which training goes on without the missing answers.
    """

    number: int
    factors: Factors
    learning_rate: float
    assignment: TierAssignment
    tiers: Mapping[str, int]
    grouping: Grouping
    uplink: Uplink
    terms: tuple[FactorTerms, ...]
    slices: tuple[RankSlice, ...]
    closing: Closing | None


def plan_round(federation: Federation, state: FederationState, population: Sequence[str]) -> RoundPlan:
    """Chooses the cohort of the round after `state`, and the settings of its requests."""
    job, layout, number = federation.job, federation.layout, state.round + 1
    factors = federation.method.factors(number, layout.factors)
    able = [name for name in population if name not in (*state.suspicion.excluded, *state.evidence.condemned)]
    cohort = tuple(federation.selection.cohort(number, able))
    assignment = assign_tiers(cohort, federation.ranks, job) if federation.ranks else all_alike(cohort, layout.rank)
    trained = {name: tier for name, tier in assignment.trained.items() if tier}
    mixed = assignment.tiers != (layout.rank,)
    grouping = cut_cohort(job, number, tuple(trained), state.suspicion, tiers=len(assignment.tiers))
    uplink = _uplink(federation, state, factors, grouping, trained if mixed else NO_TIERS)
    return RoundPlan(
        number=number,
        factors=factors,
        learning_rate=scheduled_learning_rate(job, number),
        assignment=assignment,
        tiers=trained if mixed else dict.fromkeys(trained, 0),
        grouping=grouping,
        uplink=uplink,
        terms=factor_terms(uplink, layout, factors, federation.terms.seed, number),
        slices=round_slices(uplink, layout, federation.terms.seed, number),
        closing=_closing(federation, population, grouping),
    )


def train_request(
    federation: Federation, state: FederationState, plan: RoundPlan, adapter: Downlink, tier: int
) -> TrainRequest:
    """Returns the training request for the clients of one tier."""
    return TrainRequest(
        version=PROTOCOL_VERSION,
        job_seed=federation.terms.seed,
        round=plan.number,
        base=federation.base,
        work=work_of_round(federation.job, federation.method, federation.layout, plan.number, _seconds(plan)),
        uplink=plan.uplink,
        adapter=adapter,
        tier=tier,
        rebasing=state.rebasing if plan.uplink.error_feedback else None,
    )


class Requests:
    """The payloads of a round: one for each pair of adapter version and tier.

    Args:
        broadcast: record of the versions that clients hold.
        held: the version that all clients hold after this request.
        write: makes this round's request from an adapter and a tier.
        tiers: client -> the tier it trains; a missing client has tier 0, as all have in a round without tiers.
    """

    def __init__(
        self,
        broadcast: Broadcast,
        held: Vector,
        write: Callable[[Downlink, int], Payload],
        tiers: Mapping[str, int] = NO_TIERS,
    ) -> None:
        self.broadcast = broadcast
        self._held = held
        self._write = write
        self._tiers = tiers
        self._basis: dict[str, str] = {}
        self._adapters: dict[str, Downlink] = {}
        self._payloads: dict[tuple[str, int], bytes] = {}

    def payload(self, name: str) -> bytes:
        """Returns the bytes for one client, the same at every call."""
        basis, tier = self._basis.setdefault(name, self.broadcast.basis(name)), self._tiers.get(name, 0)
        if (basis, tier) not in self._payloads:
            self._payloads[basis, tier] = encode(self._write(self._adapter(basis), tier))
        return self._payloads[basis, tier]

    def _adapter(self, basis: str) -> Downlink:
        """Returns the smaller one of the changes since the basis and since the first adapter."""
        if basis not in self._adapters:
            change = self.broadcast.write(basis, self._held)
            choices = [change] if basis == FIRST else [change, self._adapter(FIRST)]
            self._adapters[basis] = min(choices, key=lambda adapter: sum(map(len, adapter.parts)))
        return self._adapters[basis]


def _closing(federation: Federation, population: Sequence[str], grouping: Grouping) -> Closing | None:
    """Returns the schedule's closing; a round in several groups waits for all, since each needs answers of its own."""
    if len(grouping.groups) > 1:
        return None
    return federation.schedule.closing(federation.selection, population, grouping.largest)


def _seconds(plan: RoundPlan) -> float:
    return plan.closing.seconds if plan.closing else 0.0


def _uplink(
    federation: Federation, state: FederationState, factors: Factors, grouping: Grouping, trained: Mapping[str, int]
) -> Uplink:
    job, compression = federation.job, Compression.of(federation.job)
    return Uplink(
        form=federation.form.name,
        bits=compression.bits,
        density=compression.density,
        error_feedback=compression.error_feedback,
        n_max=max(grouping.largest, 1),
        clips=tuple(
            clip_within(job, federation.layout, state.round + 1, letter, state.clips[letter])
            for letter in factor_letters(factors)
        ),
        rotation=compression.rotation,
        tiers=tuple(sorted(set(trained.values()))),
        rho=rho_of_round(job.privacy),
        noised=_certainly_noised(job, grouping, trained),
    )


def _certainly_noised(job: Job, grouping: Grouping, trained: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the clients whose noise is certain in each slice of every group's sum."""
    fewest = []
    for group in filter(None, grouping.groups):
        counts = Counter(trained.get(name, 0) for name in group)
        fewest.append(certainly_noised(job, [counts[tier] for tier in sorted(counts)]))
    return tuple(map(min, zip(*fewest, strict=True)))
