"""Error feedback: what a client could not send is added to what it sends next (Karimireddy et al., 2019).

The residual lives in the coordinates of the *factor*, not of a segment: which ranks a device trains changes from
round to round, and a residual stays with the parameter it belongs to. A client that misses rounds just keeps it. If a
payload was not counted (a lost round, an aborted one), nothing was sent, and the residual is x itself.

    x = residual.compensate(update, owned)                 # owned: positions of the segment's coordinates in the
    factor payload = codec.encode(x) residual = residual.carry(x - codec.decode(payload, x.size), owned)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec.exact import ExactCodec

Places = NDArray[np.intp] | slice


@dataclass(frozen=True)
class Residual:
    """A factor's unsent part; float32, shape (count,). Never changed in place."""

    values: NDArray[np.float32]

    @classmethod
    def empty(cls, count: int) -> Residual:
        """The residual of a client that has sent everything so far."""
        return cls(np.zeros(count, dtype=np.float32))

    def compensate(self, update: NDArray[np.float32], owned: Places) -> NDArray[np.float32]:
        """update + residual, float32, over the coordinates `owned`: distinct positions in the factor."""
        return update + self.values[owned]

    def carry(self, unsent: NDArray[np.float32], owned: Places) -> Residual:
        """The residual after a round: `unsent` in the owned coordinates, the others as they were."""
        values = self.values.copy()
        values[owned] = unsent
        return Residual(values)

    def to_bytes(self) -> bytes:
        """The client's own record of it, exact and checksummed."""
        return ExactCodec().encode(self.values)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, count: int) -> Residual:
        """The inverse of `to_bytes`.

        Raises:
            PeerError: the record is damaged or belongs to another layout; start from `empty` then.
        """
        return cls(ExactCodec().decode(data, count))
