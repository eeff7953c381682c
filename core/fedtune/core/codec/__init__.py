"""Codecs for updates and adapters: chains of small parts, each with its inverse, in the clear and under masks.

`DenseCodec`, `SparseCodec` and `ExactCodec` work in the clear. `MaskableCodec` produces the words that secure
aggregation adds up. `Residual` keeps the part of an update that `SparseCodec` did not send, and `downlink` carries the
adapter to the devices.
"""

from fedtune.core.codec.clipping import ClipRange, largest_norm
from fedtune.core.codec.coordinate_selection import select_largest
from fedtune.core.codec.dense import DenseCodec
from fedtune.core.codec.downlink import apply, encode_change, rounded
from fedtune.core.codec.exact import ExactCodec
from fedtune.core.codec.maskable import DecodedSum, MaskableCodec, RingUpdate, RoundContext
from fedtune.core.codec.packing import pack, packed_size, unpack
from fedtune.core.codec.residual import Residual
from fedtune.core.codec.ring import Ring
from fedtune.core.codec.sparse import SparseCodec

__all__ = [
    "ClipRange",
    "DecodedSum",
    "DenseCodec",
    "ExactCodec",
    "MaskableCodec",
    "Residual",
    "Ring",
    "RingUpdate",
    "RoundContext",
    "SparseCodec",
    "apply",
    "encode_change",
    "largest_norm",
    "pack",
    "packed_size",
    "rounded",
    "select_largest",
    "unpack",
]
