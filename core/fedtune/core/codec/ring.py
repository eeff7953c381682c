"""The ring Z/2^ℓ in which masked updates are added, and the proof that honest sums cannot wrap around in it.

A client contributes one word u per coordinate, 0 <= u <= L. At most n_max clients are added, and

    L = floor((2^ℓ - 1) / n_max)    with    ℓ = ceil(log2(n_max·(2^b - 1) + 1)),

so Σu <= n_max·L < 2^ℓ: the sum in the ring *is* the sum. ℓ is the least width with room for b bits of each client, and
L >= 2^b - 1 uses all of that room. Ten clients of 3 bits need words of 7 bits, in which L = 12 instead of 7 costs
nothing. With the words of a segment travels a whole number, its *auxiliary sum*: the update's norm, in fixed point. It
is added modulo 2^32, and the same proof holds for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.core.errors import JobError, PeerError, RunError
from fedtune.core.text import counted

MIN_QUANTIZER_BITS = 1
MAX_QUANTIZER_BITS = 8
AUXILIARY_BITS = 32
AUXILIARY_ONE = 1 << 16  # fixed-point 1.0; a client's number in an auxiliary sum lies in [0, 1]
MAX_COHORT = (1 << AUXILIARY_BITS) // AUXILIARY_ONE - 1  # a sum of this many ones still fits the auxiliary sum


@dataclass(frozen=True)
class Ring:
    """The ring for sums of up to `n_max` words of `bits` bits.

    Raises:
        JobError: bits or n_max are out of range; within the range, 24 bits are enough for a word.
    """

    bits: int
    n_max: int

    def __post_init__(self) -> None:
        problems = []
        if not MIN_QUANTIZER_BITS <= self.bits <= MAX_QUANTIZER_BITS:
            problems.append(f"bits lie in {MIN_QUANTIZER_BITS} to {MAX_QUANTIZER_BITS}, got {self.bits}")
        elif not 1 <= self.n_max <= MAX_COHORT:
            problems.append(f"a ring is for 1 to {MAX_COHORT} clients, got {self.n_max}")
        if problems:
            raise JobError(problems)

    @property
    def levels(self) -> int:
        """L, the largest word that a client contributes; 2^b - 1 to 2^(b + 1)."""
        return ((1 << self.width) - 1) // self.n_max

    @property
    def width(self) -> int:
        """ℓ, the number of bits of a word on the wire."""
        return (self.n_max * ((1 << self.bits) - 1)).bit_length()

    def add(self, left: NDArray[np.uint32], right: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Returns (left + right) mod 2^ℓ, elementwise."""
        return (left + right) & np.uint32((1 << self.width) - 1)

    def check_sum(self, words: NDArray[np.uint32], survivors: int) -> None:
        """Checks that words can be a sum of `survivors` honest contributions.

        Raises:
            RunError: there are no survivors, or more than n_max.
            PeerError: a word exceeds survivors·L: masks did not cancel, or a contribution was out of range.
        """
        if not 1 <= survivors <= self.n_max:
            raise RunError(f"a sum has 1 to {self.n_max} survivors in this ring, got {survivors}")
        largest = int(words.max(initial=0))
        if largest > survivors * self.levels:
            raise PeerError(
                f"a sum of {counted(survivors, 'contribution')} is at most {survivors * self.levels} per word, got "
                f"{largest}: the masks did not cancel or a contribution was out of range"
            )


def norm_word(norm: float, most: float) -> int:
    """Returns the fixed-point form of norm/most, at most 1."""
    return round(min(norm / most, 1.0) * AUXILIARY_ONE)


def auxiliary_total(word: int, survivors: int) -> float:
    """Decodes an auxiliary sum to the sum of `survivors` numbers in [0, 1].

    Raises:
        PeerError: the sum is out of range.
    """
    if word > survivors * AUXILIARY_ONE:
        raise PeerError(
            f"an auxiliary sum of {counted(survivors, 'client')} is at most {survivors * AUXILIARY_ONE}, got {word}"
        )
    return word / AUXILIARY_ONE
