"""The traffic ledger: bytes and messages by direction and purpose, counted where payloads are serialised.

    ledger = Ledger().sent("adapter", 30_959).received("update", 20_792)
    total = sum(ledgers, Ledger())

Directions are the server's: messages that it sends travel down, messages that it receives travel up. The purposes:

    adapter         down    the change from the adapter that a client holds to the one that it trains
    update          up      a client's update, masked or in the clear
    keys            both    secure aggregation, exchange 0: the round's configuration, a client's keys
    shares          both    exchange 1: all clients' keys, a client's encrypted shares; their delivery in exchange 2
    votes           both    exchange 3: the survivors, a client's signature over them
    unmasking       both    exchange 4: the votes, a client's shares
    evaluation      both    an adapter to score, and the score
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

Purpose = Literal["adapter", "update", "keys", "shares", "votes", "unmasking", "evaluation"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
PROTOCOL: frozenset[Purpose] = frozenset({"keys", "shares", "votes", "unmasking"})
"""The purposes of secure aggregation's own messages, besides the updates."""


class Entry(NamedTuple):
    """A number of messages, and the sum of their bytes."""

    messages: int
    bytes: int


@dataclass(frozen=True)
class Ledger:
    """The messages and bytes that travelled, by purpose. Ledgers can be added.

    Args:
        up: traffic to the server.
        down: traffic from the server.
    """

    up: Mapping[Purpose, Entry] = field(default_factory=dict)
    down: Mapping[Purpose, Entry] = field(default_factory=dict)

    def received(self, purpose: Purpose, size: int) -> Ledger:
        """Returns this ledger with one more message that the server received."""
        return self + Ledger(up={purpose: Entry(1, size)})

    def sent(self, purpose: Purpose, size: int) -> Ledger:
        """Returns this ledger with one more message that the server sent."""
        return self + Ledger(down={purpose: Entry(1, size)})

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(_sum(self.up, other.up), _sum(self.down, other.down))

    @property
    def bytes_up(self) -> int:
        return sum(entry.bytes for entry in self.up.values())

    @property
    def bytes_down(self) -> int:
        return sum(entry.bytes for entry in self.down.values())

    @property
    def protocol_bytes(self) -> int:
        """The bytes of secure aggregation's own messages, in both directions."""
        both = (*self.up.items(), *self.down.items())
        return sum(entry.bytes for purpose, entry in both if purpose in PROTOCOL)

    def to_json(self) -> dict[str, Any]:
        """Returns {"up": {purpose: {"messages": n, "bytes": n}}, "down": ...}, without purposes of no message."""
        return {
            "up": {purpose: entry._asdict() for purpose, entry in self.up.items()},
            "down": {purpose: entry._asdict() for purpose, entry in self.down.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        """Reads what `to_json` wrote."""
        return cls(*({purpose: Entry(**entry) for purpose, entry in data[way].items()} for way in ("up", "down")))


def _sum(left: Mapping[Purpose, Entry], right: Mapping[Purpose, Entry]) -> dict[Purpose, Entry]:
    nothing = Entry(0, 0)
    return {
        purpose: Entry(*(a + b for a, b in zip(left.get(purpose, nothing), right.get(purpose, nothing), strict=True)))
        for purpose in PURPOSES
        if purpose in left or purpose in right
    }
