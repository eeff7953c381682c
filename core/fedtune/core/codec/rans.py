"""Interleaved rANS: symbols with known probabilities, in numpy, with the states of many coders side by side.

    coded, rest = encode_symbols(indices, frequencies, raw)  # raw bytes ride along, as many as there is room for
    indices, raw = decode_symbols(body, models, frequencies)    # those that did, and zeros in what room was left

Asymmetric numeral systems (Duda 2013) keep everything written so far in one number x. With the frequency f of a symbol
and the sum c of those before it, both in units of 1/2^M,

    encode:  x -> (x div f)·2^M + c + x mod f           decode:  x -> f·(x div 2^M) + x mod 2^M - c

which adds log2(2^M/f) bits to x. A state stays in [2^16, 2^32): before a symbol that would take it beyond, its lower 16
bits move into the stream, and a decoder takes them back at the same place. Symbols are dealt to many states in turn, so
that one step of numpy moves them all, each on its way; the encoder goes from the last symbol to the first.

A way begins with 2^16 and 16 bits of the caller's own, so that only its end is a loss: a state of four bytes holds on
average 24 bits. There is a way for every WAY_BITS of the symbols' information; more ways cost bits, and fewer time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtune.core.codec.wire import Reader
from fedtune.core.errors import PeerError

PRECISION = 14  # M
WAY_BITS = 1200.0  # of which eight are lost
MOST_STEPS = 1 << 13  # symbols of a way; a decoder's steps, whoever chose the bytes

_ONE = 1 << PRECISION
_LEAST = 1 << 16  # of a state
_FULL = 32 - PRECISION

Indices = NDArray[np.int64]
Frequencies = NDArray[np.uint32]


def quantized(weights: NDArray[np.int64]) -> Frequencies:
    """Returns frequencies that sum to 2^M, at least 1 where the weight is above 0; whole numbers, the same everywhere.

    Args:
        weights: at most 2^M/2 of them, below 2^48, at least one above 0.
    """
    scaled = np.where(weights > 0, np.maximum(weights * _ONE // weights.sum(), 1), 0)
    scaled[scaled.argmax()] += _ONE - scaled.sum()
    return scaled.astype(np.uint32)


def encode_symbols(
    indices: Indices, frequencies: Frequencies, raw: bytes, way_bits: float = WAY_BITS
) -> tuple[bytes, bytes]:
    """Returns the coded symbols, and what of `raw` the ways had no room for.

    The coded symbols are the number of ways, their states, the number of 16-bit words, and the words.

    Args:
        indices: a symbol's place in `frequencies`, which holds one model after the other, each with a sum of 2^M.
        frequencies: shape (models, symbols).
        way_bits: bits of information for each way.
    """
    flat, before = frequencies.reshape(-1), _sums_before(frequencies).reshape(-1)
    ways = _ways(np.bincount(indices, minlength=flat.size), flat, way_bits)
    inside = raw[: 2 * ways].ljust(2 * ways, b"\0")
    states = np.frombuffer(inside, dtype="<u2").astype(np.uint32) + np.uint32(_LEAST)
    frequency = flat.take(indices)
    most = ((frequency.astype(np.uint64) << _FULL) - 1).astype(np.uint32)  # of a state that needs not move
    others, below = np.uint32(_ONE) - frequency, before.take(indices)
    moved: list[NDArray[np.uint32]] = []
    for start in reversed(range(0, indices.size, ways)):
        row = slice(start, start + ways)
        state = states[: indices.size - start]
        full = state > most[row]
        moved.append(state[full])
        np.right_shift(state, 16, out=state, where=full)
        quotient = state // frequency[row]
        quotient *= others[row]
        state += quotient
        state += below[row]
    words = np.concatenate([np.zeros(0, np.uint32), *reversed(moved)]).astype("<u2")  # the lower 16 bits
    head = ways.to_bytes(2, "little") + states.astype("<u4").tobytes()
    return head + len(words).to_bytes(3, "little") + words.tobytes(), raw[2 * ways :]


def decode_symbols(
    body: Reader, models: NDArray[np.intp], frequencies: Frequencies
) -> tuple[NDArray[np.uint16], bytes]:
    """Decodes what `encode_symbols` wrote: uint16, one symbol for each of the models, and the raw bytes.

    Args:
        models: the model of each symbol, a row of `frequencies`.

    Raises:
        PeerError: the bytes are not the coded form of so many symbols.
    """
    count, ways = models.size, body.take_number(2, "the number of ways")
    if not 1 <= ways <= max(count, 1) <= ways * MOST_STEPS:
        raise PeerError(f"payload: {ways} ways for {count} symbols")
    states = np.frombuffer(body.take(4 * ways, "the coder's states"), dtype="<u4").astype(np.uint32)
    words = np.frombuffer(body.take(2 * body.take_number(3, "the word count"), "the coded words"), dtype="<u2")
    if (states < _LEAST).any():
        raise PeerError("payload: a coder's state is below its range")
    flat, before = frequencies.reshape(-1), _sums_before(frequencies).reshape(-1)
    symbols = np.repeat(np.arange(flat.size), flat)  # 2^M places for each model: whose range a place is in
    frequency = flat.take(symbols)
    above = np.tile(np.arange(_ONE, dtype=np.uint32), len(frequencies)) - before.take(symbols)
    places, at = models << PRECISION, 0
    for start in range(0, count, ways):
        place = places[start : start + ways]
        state = states[: place.size]
        place += state & np.uint32(_ONE - 1)
        state >>= np.uint32(PRECISION)
        state *= frequency.take(place)
        state += above.take(place)
        low = (state < _LEAST).nonzero()[0]
        taken = words[at : at + low.size]
        if taken.size != low.size:
            raise PeerError("payload: fewer coded words than its symbols take")
        state[low] = (state[low] << np.uint32(16)) | taken
        at += low.size
    raw = states - np.uint32(_LEAST)
    if at != words.size or (raw >= _LEAST).any():
        raise PeerError("payload: more coded words than its symbols take")
    return (symbols.take(places) - models * frequencies.shape[1]).astype(np.uint16), raw.astype("<u2").tobytes()


def _sums_before(frequencies: Frequencies) -> Frequencies:
    return (np.cumsum(frequencies, axis=1) - frequencies).astype(np.uint32)


def _ways(counts: NDArray[np.intp], frequencies: Frequencies, way_bits: float) -> int:
    """Returns the number of ways for symbols that occur so often, each of log2(2^M/f) bits."""
    bits = float(counts @ (PRECISION - np.log2(np.maximum(frequencies, 1))))
    return max(1, int(bits / way_bits), -(-int(counts.sum()) // MOST_STEPS))
