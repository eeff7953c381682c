"""What goes down to clients: the adapter as they hold it, and for each client only what changed since its last version.

The server has two adapters: `target`, as it would have it, and `held`, as the devices have it. After every round the
difference is sent coarsely, and what did not come across stays in `target - held` for the next time: the server's own
error feedback. Everybody who is asked in a round holds the same bits, whichever version they come from.

What the server believes a client to hold is soft state: after a restart it believes nothing, and sends what changed
since the adapter that follows from the job's seed.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from fedtune.core.adapter.layout import AdapterLayout, Vector, adapter_digest
from fedtune.core.codec import ExactCodec, encode_catch_up, encode_whole
from fedtune.core.codec.downlink import FIRST, REMEMBERED_VERSIONS
from fedtune.core.protocol.payloads import Downlink


@dataclass
class Broadcast:
    """Writes requests' adapter part for clients that hold different versions.

    Args:
        layout: the adapter's.
        first: the adapter that the job started from.
        exact: float32 for everybody, whatever they hold.
        rebased: the adapter's basis changes now and then, so that the whole may be less than what changed.
    """

    layout: AdapterLayout
    first: Vector
    exact: bool
    rebased: bool = False
    _versions: OrderedDict[str, Vector] = field(default_factory=OrderedDict)
    _holds: dict[str, str] = field(default_factory=dict)

    def basis(self, client: str) -> str:
        """The version that a client's payload should start from."""
        version = self._holds.get(client, FIRST)
        return version if version in self._versions else FIRST

    def write(self, basis: str, held: Vector) -> Downlink:
        """What turns the basis into `held`, bit for bit."""
        digest = adapter_digest(held)
        if self.exact:
            codec = ExactCodec()
            return Downlink(FIRST, digest, tuple(codec.encode(half) for half in self.layout.halves(held)))  # type: ignore[arg-type]
        old = self.first if basis == FIRST else self._versions[basis]
        halves = zip(self.layout.halves(old), self.layout.halves(held), strict=True)
        return Downlink(basis, digest, tuple(self._change(before, after) for before, after in halves))  # type: ignore[arg-type]

    def _change(self, before: Vector, after: Vector) -> bytes:
        change = encode_catch_up(before, after)
        whole = encode_whole(after) if self.rebased else None
        return change if whole is None else min(change, whole, key=len)

    def sent(self, client: str, held: Vector) -> None:
        """A client has answered a request and so holds this version."""
        if self.exact:
            return
        digest = adapter_digest(held)
        self._versions[digest] = held
        self._versions.move_to_end(digest)
        while len(self._versions) > REMEMBERED_VERSIONS:
            self._versions.popitem(last=False)
        self._holds[client] = digest

    def lost(self, client: str) -> None:
        """A client did not answer: nothing is known of what it holds."""
        self._holds.pop(client, None)
