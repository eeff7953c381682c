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
average 24 bits. There is by default a way for every WAY_BITS of the symbols' information; more ways cost bits, and
fewer time.
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
States = NDArray[np.uint32]


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
    most = ((flat.astype(np.uint64) << _FULL) - 1).astype(np.uint32)  # of a state that needs not move
    terms = [each.take(indices) for each in (most, flat, np.uint32(_ONE) - flat, before)]
    moved: list[NDArray[np.uint32]] = []
    quotients, above = np.empty(ways, dtype=np.uint32), np.empty(ways, dtype=np.bool_)
    # Arrays of no dimension and positional outputs: at this size numpy takes longer to read a call than to compute it.
    sixteen = np.array(16, dtype=np.uint32)

    def step(state: States, most: States, frequency: States, other: States, before: States) -> None:
        quotient = quotients[: state.size]
        full = np.greater(state, most, above[: state.size]).nonzero()[0]
        leaving = state[full]
        moved.append(leaving)
        state[full] = leaving >> sixteen
        np.floor_divide(state, frequency, quotient)
        np.multiply(quotient, other, quotient)
        np.add(state, quotient, state)
        np.add(state, before, state)

    whole = indices.size // ways * ways
    step(states[: indices.size - whole], *(each[whole:] for each in terms))
    for row in zip(*(each[:whole].reshape(-1, ways)[::-1] for each in terms), strict=True):
        step(states, *row)
    words = np.concatenate(moved[::-1]).astype("<u2")  # the lower 16 bits
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
    states = np.frombuffer(body.take(4 * ways, "the coder's states"), dtype="<u4").astype(np.int64)
    packed = body.take(2 * body.take_number(3, "the word count"), "the coded words")
    words = np.frombuffer(packed, dtype="<u2").astype(np.int64)
    if (states < _LEAST).any():
        raise PeerError("payload: a coder's state is below its range")
    flat, (rows, width) = frequencies.reshape(-1), frequencies.shape
    # Each model has 2^M places; these are the symbol of a place's range, its frequency and the place within the range.
    symbols = np.repeat(np.tile(np.arange(width, dtype=np.uint16), rows), flat)
    frequency = np.repeat(flat, flat).astype(np.int64)
    above = np.tile(np.arange(_ONE), rows) - np.repeat(_sums_before(frequencies).reshape(-1), flat)
    places, at = models << PRECISION, 0
    scratch, below = np.empty(ways, dtype=np.int64), np.empty(ways, dtype=np.bool_)
    ones, precision, least, sixteen = map(np.array, (_ONE - 1, PRECISION, _LEAST, 16))  # see encode_symbols

    def step(place: Indices, state: Indices, term: Indices, low: NDArray[np.bool_]) -> None:
        nonlocal at
        np.bitwise_and(state, ones, term)
        np.add(place, term, place)
        np.right_shift(state, precision, state)
        frequency.take(place, 0, term, "clip")
        np.multiply(state, term, state)
        above.take(place, 0, term, "clip")
        np.add(state, term, state)
        short = np.less(state, least, low).nonzero()[0]
        end = at + short.size
        if end > words.size:
            raise PeerError("payload: fewer coded words than its symbols take")
        refilled = np.left_shift(state[short], sixteen)
        np.bitwise_or(refilled, words[at:end], refilled)
        state[short] = refilled
        at = end

    whole = count // ways * ways
    for row in places[:whole].reshape(-1, ways):
        step(row, states, scratch, below)
    rest = count - whole
    step(places[whole:], states[:rest], scratch[:rest], below[:rest])
    raw = states - _LEAST
    if at != words.size or (raw >= _LEAST).any():
        raise PeerError("payload: more coded words than its symbols take")
    return symbols.take(places), raw.astype("<u2").tobytes()


def _sums_before(frequencies: Frequencies) -> Frequencies:
    return (np.cumsum(frequencies, axis=1) - frequencies).astype(np.uint32)


def _ways(counts: NDArray[np.intp], frequencies: Frequencies, way_bits: float) -> int:
    """Returns the number of ways for symbols that occur so often, each of log2(2^M/f) bits."""
    bits = float(counts @ (PRECISION - np.log2(np.maximum(frequencies, 1))))
    return max(1, int(bits / way_bits), -(-int(counts.sum()) // MOST_STEPS))
