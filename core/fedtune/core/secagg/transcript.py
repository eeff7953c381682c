"""The transcript of a round: the configuration and the key list, and every statement, key and graph bound to them.

Both sides build the transcript. If the server showed two clients different content, their transcripts differ, and then
signatures fail, encrypted shares do not decrypt and masks do not cancel.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedtune.core.secagg.config import carriers
from fedtune.core.secagg.exchanged import KeyEntry, RoundConfig, encode
from fedtune.core.secagg.graph import Graph
from fedtune.core.secagg.primitives import Agreement, derive, digest, framed


def config_digest(config: RoundConfig) -> bytes:
    """Returns H(cfg) = SHA-256(F("config", cfg as it travels))."""
    return digest("config", encode(config))


def advertisement_statement(config_digest: bytes, index: int, share_key: bytes, mask_key: bytes) -> bytes:
    """Returns the statement that client i signs in exchange 0: F("advertise", H(cfg), i, share key, mask key)."""
    return framed("advertise", config_digest, index, share_key, mask_key)


def commitment(seed: bytes, config_digest: bytes, index: int) -> bytes:
    """Returns client i's commitment to its self mask's seed: HKDF(b, salt = H(cfg), info = F("commitment", i)).

    It lets the server detect a wrong share before the sum is corrupted, and hides b, which has 255 bits of entropy.
    """
    return derive(seed, config_digest, "commitment", index)


def mask_agreement(seed: bytes) -> Agreement:
    """Returns the X25519 key of a mask key: HKDF(σ, no salt, info = F("mask key")). A holder of σ can check it."""
    return Agreement(derive(seed, b"", "mask key"))


class Transcript:
    """A configuration with its key list.

    Attributes:
        config: the configuration.
        config_digest: H(cfg).
        keys: key list by client index; its keys are U1.
        digest: H(keys) = SHA-256(F("keys", H(cfg), index_1, share key_1, mask key_1, signature_1, ...)).
        salt: H(keys) ‖ H(cfg), the salt of every key that is derived from here on.
    """

    def __init__(self, config: RoundConfig, config_digest: bytes, entries: Iterable[KeyEntry]) -> None:
        self.config = config
        self.config_digest = config_digest
        self.keys = {entry.client_index: entry for entry in entries}
        parts = [part for e in self.keys.values() for part in (e.client_index, e.share_key, e.mask_key, e.signature)]
        self.digest = digest("keys", config_digest, *parts)
        self.salt = self.digest + config_digest
        self._sharing = Graph(range(len(config.cohort)), config.degree, digest("share graph", self.digest))
        self._masking = self._mask_graphs()

    def holders(self, owner: int) -> frozenset[int]:
        """Returns the clients in U1 that hold shares of the owner's secrets; the relation is symmetric."""
        return self._sharing.holders(owner) & self.keys.keys()

    def partners(self, client: int, segment: int) -> frozenset[int]:
        """Returns the clients in U1 that mask this segment together with this one; the relation is symmetric."""
        return self._masking[segment].neighbours(client) & self.keys.keys()

    def sealing_key(self, shared: bytes, sender: int, receiver: int) -> bytes:
        """Returns the key that encrypts the shares of one pair in one direction.

        HKDF(DH, salt, info = F("encrypted_share", sender, receiver))
        """
        return derive(shared, self.salt, "encrypted_share", sender, receiver)

    def associated_data(self, sender: int, receiver: int) -> bytes:
        """Returns the statement that is authenticated along with encrypted shares.

        F("encrypted_share", H(cfg), H(keys), sender, receiver)
        """
        return framed("encrypted_share", self.config_digest, self.digest, sender, receiver)

    def vote_statement(self, sharers: Iterable[int], survivors: Iterable[int]) -> bytes:
        """Returns the statement that a client signs in exchange 3: F("vote", H(cfg), H(keys), U2, U3).

        A set is written as its indices in increasing order, 4 big-endian bytes each.
        """
        return framed("vote", self.config_digest, self.digest, _joined(sharers), _joined(survivors))

    def _mask_graphs(self) -> list[Graph]:
        """Returns one graph per segment, over the clients that carry it; segments of the same tiers share one."""
        by_tiers: dict[tuple[int, ...], Graph] = {}
        graphs = []
        for segment in self.config.segments:
            if segment.tiers not in by_tiers:
                seed = digest("mask graph", self.digest, *segment.tiers)
                by_tiers[segment.tiers] = Graph(carriers(self.config, segment), self.config.degree, seed)
            graphs.append(by_tiers[segment.tiers])
        return graphs


def _joined(clients: Iterable[int]) -> bytes:
    return b"".join(index.to_bytes(4, "big") for index in sorted(clients))
