"""Identities for simulated clients.

Every process of a simulation derives the same ones from the job's seed, so nothing has to be handed around. They
exercise the protocol and protect nothing: whoever has the job has the keys. Real devices draw theirs and keep them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedtune.client.secure_rounds import Credentials
from fedtune.core.job.settings import Job
from fedtune.core.secagg import Identity, MemoryRoundLog, Policy, Roster, RoundLog
from fedtune.core.secagg.primitives import KEY_BYTES
from fedtune.core.seeds import generator


@dataclass(frozen=True)
class Enrolment:
    """Who is who in a simulation.

    A simulated client's memory of served rounds lives as long as the simulation: when that goes on after a crash, its
    clients go back with it to the round that was acknowledged last.
    """

    identities: Mapping[str, Identity]
    roster: Roster
    policy: Policy
    _logs: dict[str, RoundLog] = field(default_factory=dict)

    @classmethod
    def rehearse(cls, names: Sequence[str], job: Job) -> Enrolment:
        """An identity for each client, and a policy that asks for the job's own care.

        Raises:
            InputError: a name is too long to be enrolled.
        """
        seed = job.training.seed
        identities = {name: Identity(generator(seed, "identity", name).bytes(KEY_BYTES)) for name in names}
        roster = Roster({name: identity.public for name, identity in identities.items()})
        return cls(identities, roster, Policy(max_corrupt=job.secure_aggregation.max_corrupt))

    def credentials(self, client: str) -> Credentials:
        """What a client brings to secure rounds."""
        log = self._logs.setdefault(client, MemoryRoundLog())
        return Credentials(self.identities[client], self.roster, self.policy, log)
