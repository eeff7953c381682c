"""The broadcast of the adapter: each client receives only the change since the version that it holds.

The server keeps two adapters: its own, the target, and the one that devices hold, which is the target on a grid
(`fedtune.core.codec.downlink`). All clients of a round hold the same bits, whichever version they start from.

The record of the versions that clients hold is soft state: after a restart it is empty, and the server sends the change
since the adapter that follows from the job's seed. It sends that as well where it takes fewer bytes than the change
since the version that a client holds, so a client that comes back never fetches more than a new one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from fedtune.core.adapter.layout import AdapterLayout, Vector, adapter_digest
from fedtune.core.codec import ExactCodec, encode_change
from fedtune.core.codec.downlink import FIRST, REMEMBERED_VERSIONS, rounded
from fedtune.core.protocol.messages import Downlink


@dataclass
class Broadcast:
    """Writes the adapter part of requests for clients that hold different versions.

    Args:
        layout: the adapter's.
        first: the adapter that the job started from.
        bits: resolution of the change since the first adapter; None where all clients receive the whole adapter as
            float32, whatever they hold.
    """

    layout: AdapterLayout
    first: Vector
    bits: int | None
    _versions: OrderedDict[str, Vector] = field(default_factory=OrderedDict)
    _holds: dict[str, str] = field(default_factory=dict)

    def basis(self, client: str) -> str:
        """Returns the version that a client's payload starts from."""
        version = self._holds.get(client, FIRST)
        return version if version in self._versions else FIRST

    def to_hold(self, target: Vector) -> Vector:
        """Returns the adapter that devices shall hold where the server's own is `target`."""
        return rounded(self.layout, self.first, target, self.bits)

    def write(self, basis: str, held: Vector) -> Downlink:
        """Returns the payload that turns the basis into `held`, bit for bit."""
        digest = adapter_digest(held)
        if self.bits is None:
            codec = ExactCodec()
            return Downlink(FIRST, digest, tuple(codec.encode(part) for part in self.layout.parts(held)))
        old = self.first if basis == FIRST else self._versions[basis]
        parts = zip(self.layout.parts(old), self.layout.parts(held), strict=True)
        return Downlink(basis, digest, tuple(encode_change(before, after) for before, after in parts))

    def sent(self, client: str, held: Vector) -> None:
        """Records that a client holds this version, because it has answered the request."""
        if self.bits is None:
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
