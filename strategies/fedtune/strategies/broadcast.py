"""The broadcast of the adapter: each client receives only the change since the version that it holds.

The server keeps two adapters: `target`, its own, and `held`, the one that the devices have. After every round it sends
a coarse form of the difference, and the remainder stays in `target - held` for the next round: error feedback on the
server. All clients of a round hold the same bits, whichever version they start from.

The record of the versions that clients hold is soft state: after a restart it is empty, and the server sends the change
since the adapter that follows from the job's seed.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from fedtune.core.adapter.layout import AdapterLayout, Vector, adapter_digest
from fedtune.core.codec import ExactCodec, encode_catch_up, encode_whole
from fedtune.core.codec.downlink import FIRST, REMEMBERED_VERSIONS
from fedtune.core.protocol.messages import Downlink


@dataclass
class Broadcast:
    """Writes the adapter part of requests for clients that hold different versions.

    Args:
        layout: the adapter's.
        first: the adapter that the job started from.
        exact: whether all clients receive the whole adapter as float32, whatever they hold.
        rebased: whether the adapter's basis changes at times, so that the whole adapter may be smaller than the change.
    """

    layout: AdapterLayout
    first: Vector
    exact: bool
    rebased: bool = False
    _versions: OrderedDict[str, Vector] = field(default_factory=OrderedDict)
    _holds: dict[str, str] = field(default_factory=dict)

    def basis(self, client: str) -> str:
        """Returns the version that a client's payload starts from."""
        version = self._holds.get(client, FIRST)
        return version if version in self._versions else FIRST

    def write(self, basis: str, held: Vector) -> Downlink:
        """Returns the payload that turns the basis into `held`, bit for bit."""
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
        """Records that a client holds this version, because it has answered the request."""
        if self.exact:
            return
        digest = adapter_digest(held)
        self._versions[digest] = held
        self._versions.move_to_end(digest)
        while len(self._versions) > REMEMBERED_VERSIONS:
            self._versions.popitem(last=False)
        self._holds[client] = digest

    def lost(self, client: str) -> None:
        """Forgets which version a client holds, because it did not answer."""
        self._holds.pop(client, None)
