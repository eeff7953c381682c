"""The seeds of noise: of a machine's entropy where noise hides something, of the job's seed in a simulation.

seed = of_entropy("kitchen", terms)         # live: nobody can foresee it
seed = from_seed(terms_seed)("c3", terms)   # simulated: anybody can
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from fedtune.core.codec.uplink import FactorTerms
from fedtune.core.privacy.discrete_gaussian import KEY_BYTES

NoiseSeed = Callable[[str, FactorTerms], int]
"""(who adds the noise, the terms of what it is added to) -> a number of 256 bits, used once."""


def of_entropy(who: str, terms: FactorTerms) -> int:
    """Returns a seed of the operating system's entropy."""
    del who, terms
    return int.from_bytes(os.urandom(KEY_BYTES), "big")


def from_seed(seed: int) -> NoiseSeed:
    """Returns seeds that follow from a job's, so that a simulation repeats; they hide nothing from who knows it."""

    def derived(who: str, terms: FactorTerms) -> int:
        text = "\x1f".join(["fedtune-noise", str(seed), str(terms.round), who, *map(str, terms.label)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")

    return derived
