"""The entropy coder for quantized values in the clear: vectors of whole numbers that are mostly zero, and back.

A level vector is coded in pieces of up to PIECE levels, and within a piece in blocks of BLOCK neighbours. Trained
changes are uneven: some modules change much, others hardly. So every block begins with its *class*, the bit length of
Σ|level|. Blocks of class 0 are all zero and cost nothing more; the magnitudes of each other class share one probability
table, counted over the piece and sent along. rANS (`fedtune.core.codec.rans`) spends -log2(p) bits on each magnitude.
That includes the positions of the non-zero levels: with one class their cost equals the entropy of the gaps, and with
several classes it is less. Signs, and the low bits of magnitudes from DIRECT on, are nearly random and are written
without coding.

    piece     = table of the classes, one table per class present except 0, coded classes, coded magnitudes of the
                blocks of other classes than 0, then what of the rest the coder's ways had no room for
    rest      = one sign bit per non-zero level (1 is negative), low bits packed octave by octave
    table     = number of symbols (1 byte), one weight code per symbol (1 byte each)
    magnitude = symbol m for m < DIRECT, else symbol DIRECT + k and 4 + k low bits for 2^(4+k) <= m < 2^(5+k)

A weight code c means 0 for c = 0 and otherwise (16 + c mod 16)·2^(c div 16): whole numbers within 3% of the counts,
so both sides build the same model from the same table, independent of their floating-point arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec.packing import pack, packed_size, unpack
from fedtune.core.codec.quantization import MAX_LEVEL
from fedtune.core.codec.rans import Frequencies, decode_symbols, encode_symbols, quantized
from fedtune.core.codec.wire import Reader
from fedtune.core.errors import PeerError

PIECE = 1 << 20
BLOCK = 128
DIRECT = 16
CLASS_WAY_BITS = 100.0  # there are few classes: in as few ways as magnitudes they took half of the time

_DIRECT_BITS = DIRECT.bit_length() - 1
_MAX_SYMBOLS = DIRECT + MAX_LEVEL.bit_length() - _DIRECT_BITS
_MAX_CLASSES = (BLOCK * MAX_LEVEL).bit_length() + 1
_CODES = np.arange(256)
_WEIGHTS = np.where(_CODES == 0, 0, (16 + _CODES % 16) << (_CODES // 16)).astype(np.int64)


def encode_levels(levels: NDArray[np.int32]) -> bytes:
    """Returns the coded form of levels within ±MAX_LEVEL, shape (count,)."""
    return b"".join(_encode_piece(levels[start : start + PIECE]) for start in range(0, levels.size, PIECE))


def decode_levels(body: Reader, count: int) -> NDArray[np.int32]:
    """Decodes what `encode_levels` wrote, and leaves the reader just past the last piece.

    Raises:
        PeerError: the bytes are not the coded form of `count` levels.
    """
    levels = np.empty(count, dtype=np.int32)
    for start in range(0, count, PIECE):
        piece = levels[start : start + PIECE]
        piece[:] = _decode_piece(body, piece.size)
    return levels


def max_coded_size(count: int) -> int:
    """Returns an upper bound for the bytes of `count` coded levels."""
    pieces = -(-count // PIECE)
    tables = (1 + _MAX_CLASSES) + _MAX_CLASSES * (1 + _MAX_SYMBOLS)
    return 8 * count + pieces * (tables + 64)


def _encode_piece(levels: NDArray[np.int32]) -> bytes:
    magnitudes = np.zeros((-(-levels.size // BLOCK), BLOCK), dtype=np.int32)
    np.abs(levels, out=magnitudes.reshape(-1)[: levels.size])
    classes = _bit_length(magnitudes.sum(axis=1, dtype=np.int64))
    symbols, low_bits = _split(magnitudes)

    signs = np.packbits(levels[levels != 0] < 0, bitorder="little")
    table = _encode_table(classes)
    used = _used_classes(table)
    tables = [_encode_table(symbols[classes == each].reshape(-1)) for each in used]
    coded_classes, rest = encode_symbols(
        classes.astype(np.int64), _models([table]), signs.tobytes() + low_bits, CLASS_WAY_BITS
    )
    coded = [coded_classes]
    if used:
        active, models = classes > 0, _models(tables)
        rows = np.searchsorted(used, classes[active]) * models.shape[1]
        symbols_coded, rest = encode_symbols((rows[:, np.newaxis] + symbols[active]).reshape(-1), models, rest)
        coded.append(symbols_coded)
    head = b"".join(bytes([len(each)]) + each.tobytes() for each in [table, *tables])
    return b"".join([head, *coded, rest])


def _decode_piece(body: Reader, count: int) -> NDArray[np.int32]:
    blocks = -(-count // BLOCK)
    table = _take_table(body, _MAX_CLASSES)
    used = _used_classes(table)
    tables = [_take_table(body, _MAX_SYMBOLS) for _ in used]
    magnitudes = np.zeros((blocks, BLOCK), dtype=np.int32)
    classes, inside = decode_symbols(body, np.zeros(blocks, dtype=np.intp), _models([table]))
    if used:
        active = classes > 0
        models = np.repeat(np.searchsorted(used, classes[active]), BLOCK)
        decoded, more = decode_symbols(body, models, _models(tables))
        inside += more
        magnitudes[active] = decoded.reshape(-1, BLOCK)
    levels, padding = magnitudes.reshape(-1)[:count], magnitudes.reshape(-1)[count:]
    present = np.flatnonzero(levels)
    size = packed_size(present.size, 1) + _low_bits_size(levels)
    rest = Reader(memoryview(inside + body.take(max(0, size - len(inside)), "signs and low bits")))
    signs = np.frombuffer(rest.take(packed_size(present.size, 1), "the signs"), dtype=np.uint8)
    negative = present[np.unpackbits(signs, count=present.size, bitorder="little").astype(np.bool_)]
    _add_low_bits(levels, rest)
    if padding.any() or int(levels.max(initial=0)) > MAX_LEVEL:
        raise PeerError(f"payload: it decodes to levels beyond {MAX_LEVEL} or beyond its {count} coordinates")
    levels[negative] *= -1
    return levels


def _bit_length(numbers: NDArray[np.int64] | NDArray[np.int32]) -> NDArray[np.int32]:
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int32)


def _split(magnitudes: NDArray[np.int32]) -> tuple[NDArray[np.int32], bytes]:
    """Replaces magnitudes by symbols, in place; returns the symbols and the packed low bits."""
    flat = magnitudes.reshape(-1)
    large = np.flatnonzero(flat >= DIRECT)
    values = flat[large]
    octaves = _bit_length(values) - 1 - _DIRECT_BITS
    flat[large] = DIRECT + octaves
    packed = []
    for octave in range(int(octaves.max(initial=-1)) + 1):
        bits = _DIRECT_BITS + octave
        packed.append(pack((values[octaves == octave] - (1 << bits)).astype(np.uint32), bits))
    return magnitudes, b"".join(packed)


def _low_bits_size(flat: NDArray[np.int32]) -> int:
    """Returns the bytes of the low bits that belong to symbols."""
    counts = np.bincount(flat[flat >= DIRECT] - DIRECT)
    return sum(packed_size(int(count), _DIRECT_BITS + octave) for octave, count in enumerate(counts) if count)


def _add_low_bits(flat: NDArray[np.int32], body: Reader) -> None:
    """Replaces symbols by magnitudes, in place: the inverse of `_split`."""
    large = np.flatnonzero(flat >= DIRECT)
    octaves = flat[large] - DIRECT
    for octave in range(int(octaves.max(initial=-1)) + 1):
        bits = _DIRECT_BITS + octave
        chosen = large[octaves == octave]
        low = unpack(body.take(packed_size(chosen.size, bits), "the low bits"), bits, chosen.size)
        flat[chosen] = (1 << bits) + low.astype(np.int32)


def _encode_table(symbols: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Returns weight codes of the symbols 0 to the largest one; a symbol that occurs never gets weight 0."""
    counts = np.bincount(symbols)
    scaled = counts * (int(_WEIGHTS[-1]) / int(counts.max()))
    codes = np.maximum(np.searchsorted(_WEIGHTS, scaled, side="right") - 1, 1)
    return np.where(counts > 0, codes, 0).astype(np.uint8)


def _take_table(body: Reader, most: int) -> NDArray[np.uint8]:
    symbols = body.take_number(1, "the size of a table")
    if not 1 <= symbols <= most:
        raise PeerError(f"payload: a table of {symbols} symbols, expected 1 to {most}")
    table = np.frombuffer(body.take(symbols, "a table"), dtype=np.uint8)
    if not table.any():
        raise PeerError("payload: a table without any weight")
    return table


def _used_classes(table: NDArray[np.uint8]) -> list[int]:
    """Returns the classes that occur, without class 0."""
    return [int(present) for present in np.flatnonzero(table) if present > 0]


def _models(tables: list[NDArray[np.uint8]]) -> Frequencies:
    """Returns the coder's frequencies, one row for each table."""
    found = np.zeros((len(tables), max(map(len, tables))), dtype=np.uint32)
    for row, table in zip(found, tables, strict=True):
        row[: len(table)] = quantized(_WEIGHTS[table])
    return found
