"""A whole secure cohort in one process, with the five exchanges as a loop, for tests and benchmarks.

rehearsal = Rehearsal.prepare(tiers=[0] * 10, segments=[Segment("v", 1000, 8, 15, (0,))])
updates = random_updates(rehearsal.server.config)
result = rehearsal.run(updates, silent={Stage.MASK: {"client-3"}})
assert (result.sums["v"] == plain_sum(updates, "v", result.survivors)).all()
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.core.secagg.client_session import ClientSession
from fedtune.core.secagg.config import Assumptions, Policy, Subject, round_config, segments_of
from fedtune.core.secagg.exchanged import Member, RoundConfig, Segment
from fedtune.core.secagg.identity import Identity, Roster
from fedtune.core.secagg.masking import Words
from fedtune.core.secagg.primitives import Random
from fedtune.core.secagg.round_log import MemoryRoundLog, RoundLog, RoundMark
from fedtune.core.secagg.server_session import OpenedSum, ServerSession, Stage

Update = Mapping[str, Words]

LENIENT = Policy(max_corrupt=0.1, min_survivors=2, min_tier_survivors=1, min_tier_honest=0)
"""The policy of rehearsed clients, which accept a cohort of two."""

FIRST = RoundMark(1, 0)


def enrol(names: Iterable[str], random: Random = os.urandom) -> tuple[dict[str, Identity], Roster]:
    """Makes an identity for each name, and the roster of them all."""
    identities = {name: Identity.generate(random) for name in names}
    return identities, Roster({name: identity.public for name, identity in identities.items()})


@dataclass(frozen=True)
class Rehearsal:
    """One round among sessions in this process."""

    server: ServerSession
    clients: Mapping[str, ClientSession]

    @classmethod
    def prepare(
        cls,
        tiers: Sequence[int],
        segments: Sequence[Segment],
        *,
        max_dropout: float = 0.3,
        mark: RoundMark = FIRST,
        random: Random = os.urandom,
    ) -> Rehearsal:
        """Makes a round for the cohort's tiers and the segments; clients are called client-0, client-1 ..."""
        members = [Member(f"client-{index}", tier) for index, tier in enumerate(tiers)]
        identities, roster = enrol([member.client for member in members], random)
        config = round_config(
            Subject("rehearsal", mark, "0" * 64, "1" * 64),
            members,
            segments,
            Assumptions(LENIENT.max_corrupt, max_dropout, LENIENT.min_tier_survivors),
            random,
        )
        return cls.start(config, identities, roster, random=random)

    @classmethod
    def start(
        cls,
        config: RoundConfig,
        identities: Mapping[str, Identity],
        roster: Roster,
        logs: Mapping[str, RoundLog] | None = None,
        policy: Policy = LENIENT,
        random: Random = os.urandom,
    ) -> Rehearsal:
        """Starts new sessions for all invited clients."""
        names = [member.client for member in config.cohort]
        logs = logs or {name: MemoryRoundLog() for name in names}
        clients = {name: ClientSession(name, identities[name], roster, policy, logs[name], random) for name in names}
        return cls(ServerSession(config, roster), clients)

    def answer(self, client: str, request: bytes, updates: Mapping[str, Update]) -> bytes:
        """Returns one client's answer in the current exchange."""
        session, config = self.clients[client], self.server.config
        match self.server.stage:
            case Stage.ADVERTISE:
                held = {"base_digest": config.base_digest, "adapter_digest": config.adapter_digest}
                return session.advertise(request, **held)
            case Stage.SHARE:
                return session.share(request)
            case Stage.MASK:
                return session.mask(request, updates[client])
            case Stage.VOTE:
                return session.vote(request)
            case _:
                return session.unmask(request)

    def exchange(
        self, requests: Mapping[str, bytes], updates: Mapping[str, Update], silent: Set[str] = frozenset()
    ) -> dict[str, bytes]:
        """Runs one exchange, in which all clients but the silent ones answer; returns the next requests.

        Raises:
            RoundAbortedError: too many were silent.
        """
        for client, request in requests.items():
            if client not in silent:
                self.server.receive(client, self.answer(client, request, updates))
        return self.server.advance()

    def until(
        self, stage: Stage, updates: Mapping[str, Update], silent: Mapping[Stage, Set[str]] | None = None
    ) -> dict[str, bytes]:
        """Opens the round and runs up to a stage; returns the requests of that stage.

        Args:
            stage: the first exchange that is left to do, or `Stage.DONE`.
            updates: the words that each client adds, by client and segment name.
            silent: the clients that vanish in each exchange, before they answer.

        Raises:
            RoundAbortedError: too many were silent.
        """
        requests = self.server.open()
        while self.server.stage is not stage:
            requests = self.exchange(requests, updates, (silent or {}).get(self.server.stage, frozenset()))
        return requests

    def run(self, updates: Mapping[str, Update], silent: Mapping[Stage, Set[str]] | None = None) -> OpenedSum:
        """Runs all five exchanges; arguments and errors are those of `until`."""
        self.until(Stage.DONE, updates, silent)
        return self.server.result


def random_updates(config: RoundConfig, seed: int = 0) -> dict[str, Update]:
    """Draws words from 0 to each segment's limit for every client, from one seed."""
    rng = np.random.default_rng(seed)
    updates: dict[str, Update] = {}
    for client, member in enumerate(config.cohort):
        carried = [config.segments[index] for index in segments_of(config, client)]
        updates[member.client] = {s.name: rng.integers(0, s.limit, s.length, np.uint64, True) for s in carried}
    return updates


def plain_sum(updates: Mapping[str, Update], segment: str, clients: Iterable[str]) -> NDArray[np.uint64]:
    """Returns the expected secure sum of a segment: the plain sum of these clients' words."""
    vectors = [updates[client][segment] for client in clients if segment in updates[client]]
    total: NDArray[np.uint64] = np.sum(vectors, axis=0, dtype=np.uint64)
    return total
