"""Secure rounds without a model: the strategy's side and the clients' side, joined by function calls.

fixture = Fixture(names)
state, record = fixture.run(drop=lambda name, message_type: False)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedtune.client.device import Contribution
from fedtune.client.secure_rounds import Credentials, SecureRounds
from fedtune.client.trainer import LocalResult
from fedtune.core.adapter.layout import AdaptedModule, adapter_digest
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.codec.update_forms import RING
from fedtune.core.codec.uplink import FactorTerms, factor_terms
from fedtune.core.errors import PeerError
from fedtune.core.job.job_file import load_job
from fedtune.core.protocol.messages import OPEN, SHARE, TRAIN, UNMASK, VOTE, Base, TrainRequest, query
from fedtune.core.round_records import RoundRecord
from fedtune.core.secagg import Identity, MemoryRoundLog, Policy, Roster
from fedtune.core.seeds import derive_seed, generator
from fedtune.strategies.assembly import Clients, assemble
from fedtune.strategies.broadcast import Broadcast
from fedtune.strategies.collection import Exchange
from fedtune.strategies.federation import Federation, FederationState, initial_state
from fedtune.strategies.round import TrainingRound
from fedtune.strategies.secure_sum import SecureAggregation

LAYOUT = LoraLayout((AdaptedModule("q", 8, 6), AdaptedModule("up", 6, 10)), rank=4, alpha=8.0)
BASE = Base("demo", "0" * 64, "nf4", 4, 8.0, ("all-linear",), 256)
Drop = Callable[[str, str], bool]


class Untrained:
    """A device without a model, whose updates are drawn from a seed."""

    job: str | None = None
    """The digest of the terms that it is bound to."""

    def hold(self, request: TrainRequest) -> str:
        return request.adapter.digest

    def terms(self, request: TrainRequest) -> tuple[FactorTerms, ...]:
        return factor_terms(request.uplink, LAYOUT, request.work.factors, request.job_seed, request.round)

    def contribute(self, client: str, request: TrainRequest) -> Contribution:
        uplink, number = request.uplink, request.round
        terms = factor_terms(uplink, LAYOUT, request.work.factors, request.job_seed, number, request.tier)
        parts = []
        for each in terms:
            whole = 0.01 * generator(9, client, number, each.factor).standard_normal(each.whole)
            update = whole.astype(np.float32)[each.indices]
            parts.append(RING.contribute(update, each, derive_seed(7, client, number, *each.label)))
        result = LocalResult(whole.astype(np.float32), 1, 1, 1.0, 1, 1, 0.0)
        return Contribution(result, terms, tuple(parts))


@dataclass
class Fixture:
    """A server and the clients it invites."""

    names: Sequence[str]
    overrides: Sequence[str] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    device: Untrained = field(default_factory=Untrained)

    def __post_init__(self) -> None:
        identities = {name: Identity(generator(5, name).bytes(32)) for name in self.names}
        self.roster = Roster({name: identity.public for name, identity in identities.items()})
        logs = {name: MemoryRoundLog() for name in self.names}
        self.rounds = SecureRounds(
            self.device,  # type: ignore[arg-type]
            lambda name: Credentials(identities[name], self.roster, Policy(), logs[name]),
        )
        job = load_job(None, ["federation.clients_per_round=1.0", "adapter.rank=4", *self.overrides])
        clients = Clients(ranks=self.ranks.__getitem__ if self.ranks else None)
        secure = SecureAggregation(self.roster, self._clock) if job.secure_aggregation.enabled else None
        self.federation: Federation = assemble(job, BASE, LAYOUT, clients, secure=secure)
        self.state: FederationState = initial_state(self.federation)
        self.broadcast = Broadcast(LAYOUT, LAYOUT.initial(self.federation.terms.seed), bits=4)
        self._ticks = 0

    def open(self) -> TrainingRound:
        """Opens the next round, in which no client has been asked yet."""
        return TrainingRound.open(self.federation, self.state, self.names, self.broadcast)

    def answer(self, name: str, exchange: Exchange) -> bytes:
        """Returns a client's answer."""
        parts = exchange.requests[name]
        if exchange.message_type == query(OPEN):
            return self.rounds.open(name, *parts)
        step = {
            query(SHARE): self.rounds.share,
            TRAIN: self.rounds.train,
            query(VOTE): self.rounds.vote,
            query(UNMASK): self.rounds.unmask,
        }[exchange.message_type]
        return step(name, *parts)

    def run(self, drop: Drop = lambda name, kind: False) -> RoundRecord:
        """Runs a whole round, in which clients for which drop(name, message type) is true never answer."""
        round_ = self.open()
        for exchange in round_.exchanges():
            for name in exchange.requests:
                if drop(name, exchange.message_type):
                    round_.give_up(name, "gone")
                    continue
                try:
                    round_.take_in(name, self.answer(name, exchange))
                except PeerError as error:
                    round_.give_up(name, str(error))
        self.state, record = round_.close()
        return record

    @property
    def digest(self) -> str:
        return adapter_digest(self.state.adapter)

    def _clock(self) -> int:
        self._ticks += 1_000_000
        return self._ticks
