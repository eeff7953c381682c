"""Error feedback: values that a client could not send are added to its next update (Karimireddy et al., 2019).

The residual is indexed by the coordinates of the *factor*, not of a segment: the rank indices that a device trains
change from round to round, and a residual stays with its parameter. A client that misses rounds keeps its residual. If
a payload was not counted (in a lost or aborted round), nothing was sent, and the residual is x itself.

    x = residual.compensate(update, owned)      # owned: positions of the segment's coordinates in the factor
    payload = codec.encode(x)
    residual = residual.carry(x - codec.decode(payload, x.size), owned)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec.exact import ExactCodec

Places = NDArray[np.intp] | slice


@dataclass(frozen=True)
class Residual:
    """The unsent part of a factor's updates; float32, shape (count,). It is never changed in place."""

    values: NDArray[np.float32]

    @classmethod
    def empty(cls, count: int) -> Residual:
        """Returns the residual of a client that has sent everything so far."""
        return cls(np.zeros(count, dtype=np.float32))

    def compensate(self, update: NDArray[np.float32], owned: Places) -> NDArray[np.float32]:
        """Returns update + residual, float32, over the coordinates `owned`: distinct positions in the factor."""
        return update + self.values[owned]

    def carry(self, unsent: NDArray[np.float32], owned: Places) -> Residual:
        """Returns the residual after a round: `unsent` in the owned coordinates, the others as they were."""
        values = self.values.copy()
        values[owned] = unsent
        return Residual(values)

    def to_bytes(self) -> bytes:
        """Returns the residual as bytes for the client's own state, exact and checksummed."""
        return ExactCodec().encode(self.values)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, count: int) -> Residual:
        """Reads what `to_bytes` wrote.

        Raises:
            PeerError: the bytes are damaged or belong to another layout; start from `empty` then.
        """
        return cls(ExactCodec().decode(data, count))
