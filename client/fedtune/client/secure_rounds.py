"""A device's side of secure rounds: it trains once, and sends the server only a masked update.

    rounds = SecureRounds(device, credentials)
    reply = rounds.open(client, config, request)    # exchange 0: the configuration, and the request to train
    reply = rounds.share(client, message)           # exchange 1
    reply = rounds.train(client, message)           # exchange 2: trains, masks
    reply = rounds.vote(client, message)            # exchange 3
    reply = rounds.unmask(client, message)          # exchange 4; the round is over for this device

`fedtune.core.secagg.ClientSession` holds the protocol, its checks and its secrets. This module connects it to training:
the configuration must match the adapter, the base, the work and the codec terms of the request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from fedtune.client.device import Contribution, Device, own_tier
from fedtune.core.codec.masked import masked_segments, masked_words
from fedtune.core.privacy.budget import honest_survivors
from fedtune.core.protocol.messages import TrainRequest, decode, terms_digest
from fedtune.core.secagg import ClientSession, Identity, Policy, Roster, RoundLog, ServerFaultError
from fedtune.core.secagg.exchanged import MAX_CONFIG_BYTES, RoundConfig
from fedtune.core.secagg.exchanged import decode as decode_message
from fedtune.core.secagg.graph import colluders
from fedtune.core.spans import span


@dataclass(frozen=True)
class Credentials:
    """A client's credentials for secure rounds.

    Args:
        identity: its long-lived key.
        roster: public keys of all enrolled clients, its own included.
        policy: requirements that it enforces, whatever the server demands.
        log: its record of the rounds that it has served.
    """

    identity: Identity
    roster: Roster
    policy: Policy
    log: RoundLog


@dataclass
class _Round:
    """A round under way."""

    session: ClientSession
    request: TrainRequest
    contribution: Contribution | None = None


class SecureRounds:
    """The secure rounds of a device's clients, at most one at a time for each.

    Args:
        credentials: client -> its credentials.
    """

    def __init__(self, device: Device, credentials: Callable[[str], Credentials]) -> None:
        self._device = device
        self._credentials = credentials
        self._rounds: dict[str, _Round] = {}

    def open(self, client: str, config: bytes, request: bytes) -> bytes:
        """Takes the configuration and the request; returns the client's keys. A round that is still open ends.

        Raises:
            ServerFaultError: the client does not accept the configuration, or it does not match the request.
            PeerError, ModelError: as in `Device.train`.
        """
        asked, own = decode(request, TrainRequest), self._credentials(client)
        self._check(decode_message(config, RoundConfig, MAX_CONFIG_BYTES), client, asked, own.policy)
        self.close(client)
        held = self._device.hold(asked)
        session = ClientSession(client, own.identity, own.roster, own.policy, own.log)
        reply = session.advertise(config, base_digest=asked.base.digest, adapter_digest=held)
        self._rounds[client] = _Round(session, asked)
        return reply

    def share(self, client: str, message: bytes) -> bytes:
        """Takes all clients' keys; returns the shares of this client's secrets, encrypted for their holders."""
        return self._round(client).session.share(message)

    def train(self, client: str, message: bytes) -> bytes:
        """Takes the shares that this client holds for others; trains, and returns the masked update.

        Raises:
            UpdateError: training gave no update that may be sent.
        """
        round_ = self._round(client)
        if round_.contribution is None:
            round_.contribution = self._device.contribute(client, round_.request)
        made = round_.contribution
        with span("masking", client):
            return round_.session.mask(message, masked_words(made.terms, made.parts, made.result.loss))

    def vote(self, client: str, message: bytes) -> bytes:
        """Takes the sharers and survivors; returns this client's signature over them."""
        return self._round(client).session.vote(message)

    def unmask(self, client: str, message: bytes) -> bytes:
        """Takes a quorum of signatures; returns the shares that open the sum, and deletes the round."""
        reply = self._round(client).session.unmask(message)
        self.close(client)
        return reply

    def close(self, client: str) -> None:
        """Ends a client's round, if one is open, and wipes its secrets."""
        if round_ := self._rounds.pop(client, None):
            round_.session.close()

    def _round(self, client: str) -> _Round:
        if client not in self._rounds:
            raise ServerFaultError(f"no secure round is open for {client}")
        return self._rounds[client]

    def _check(self, config: RoundConfig, client: str, request: TrainRequest, policy: Policy) -> None:
        """Raises ServerFaultError unless the configuration matches the request, so that no other sum can be formed.

        The session checks that base and adapter match, against those that this device holds.
        """
        if request.uplink.form != "ring":
            raise ServerFaultError(f"asked for an update of form {request.uplink.form}, which cannot be masked")
        terms, tiers = self._device.terms(request), request.uplink.tiers
        tier = tiers.index(own_tier(request)) if tiers else 0
        pairs = {
            "job": (config.job, self._device.job or config.job),
            "round": (config.round, request.round),
            "work and codec": (config.context, terms_digest(request)),
            "segments": (config.segments, masked_segments(terms, tiers)),
            "tier": ({member.tier for member in config.cohort if member.client == client}, {tier}),
        }
        wrong = [what for what, (configured, asked) in pairs.items() if configured != asked]
        if len(config.cohort) > request.uplink.n_max:
            wrong.append("n_max")
        if any(counted > sure for counted, sure in zip(request.uplink.noised, _honest(config, policy), strict=False)):
            wrong.append("noised")
        if wrong:
            raise ServerFaultError(
                f"the round's configuration does not match the request to {client}: {', '.join(wrong)}"
            )


def _honest(config: RoundConfig, policy: Policy) -> tuple[int, ...]:
    """Returns the fewest honest clients in each slice's sum, as this client sees collusion."""
    counts, tiers = Counter(member.tier for member in config.cohort), len(config.tier_minimums)
    by_tier = [counts[tier] for tier in range(tiers)]
    least = config.tier_minimums if tiers > 1 else (0,)
    return honest_survivors(by_tier, config.minimum, least, colluders(policy.max_corrupt, len(config.cohort)))
