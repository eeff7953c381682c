"""How much does a round of secure aggregation cost a client and the server, from 10 to 10,000 clients?

Cohorts up to `--whole` clients are run in full and measured. For every cohort the cost is also computed: each operation
is timed once and multiplied by how often the protocol does it, so that the measured rows show how good the computed
ones are. Seconds are CPU seconds; a fifth of the cohort drops out after sharing its keys.

    python benchmarks/secagg/cost.py                           # a minute or two
    python benchmarks/secagg/cost.py --whole 1000              # measures 300 and 1,000 too: a quarter of an hour
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from compare import BITS, make_updates, our_round
from round_cost import Cost

from fedtune.core.codec.packing import pack, packed_size, unpack
from fedtune.core.secagg import Identity, Roster, choose_thresholds
from fedtune.core.secagg.exchanged import ENCRYPTED_SHARE_BYTES
from fedtune.core.secagg.masking import add_masks, word_type
from fedtune.core.secagg.primitives import Agreement, derive, seal, unseal
from fedtune.core.secagg.shamir import split

COHORTS = (10, 30, 100, 200, 300, 1000, 10_000)
MAX_CORRUPT, MAX_DROPOUT, DROPOUT = 0.1, 0.3, 0.2
SEGMENTS = 2  # the vector and the weight
ENTRY_BYTES = 136  # of a key list's entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--whole", type=int, default=100, help="the largest cohort to run whole")
    options = parser.parse_args()
    units = time_units()
    print(f"{options.parameters:,} parameters, b = {BITS}, {DROPOUT:.0%} dropout, at most {MAX_DROPOUT:.0%}\n")
    print("| n | k/t | | client s | server s | up kB | down kB |\n|---|---|---|---|---|---|---|")
    for n in COHORTS:
        thresholds = choose_thresholds(n, MAX_CORRUPT, MAX_DROPOUT)
        rows = [("counted", counted(n, options.parameters, units))]
        if n <= options.whole:
            rows.append(("measured", our_round(make_updates(n, options.parameters), int(DROPOUT * n))))
        for how, cost in rows:
            print(
                f"| {n:,} | {thresholds.degree}/{thresholds.threshold} | {how} | {cost.client:.3f} | {cost.server:.2f} "
                f"| {cost.up / 1000:.0f} | {cost.down / 1000:.0f} |",
                flush=True,
            )


@dataclass(frozen=True)
class Units:
    """CPU seconds of an operation; `multiply` is a step of Horner's rule in the field, the last three are per word."""

    verify: float
    agree: float
    derive: float
    encrypted_share: float
    multiply: float
    mask: float
    pack: float
    unpack: float


def time_units() -> Units:
    identity, statement, key = Identity.generate(), bytes(200), os.urandom(32)
    roster, signature, agreement = Roster({"a": identity.public}), identity.sign(statement), Agreement(key)
    words, packed_words = np.zeros(1 << 18, word_type(11)), np.zeros(1 << 18, np.uint32)
    packed = pack(packed_words, 11)
    return Units(
        verify=per_call(lambda: roster.verify("a", statement, signature)),
        agree=per_call(lambda: agreement(agreement.public)),
        derive=per_call(lambda: derive(key, key, "benchmark", 1, 2, 3)),
        encrypted_share=per_call(lambda: unseal(key, seal(key, bytes(64), statement), statement)) / 2,
        multiply=per_call(lambda: split(1, 101, range(1, 11), os.urandom)) / 1000,
        mask=per_call(lambda: add_masks(words, [key])) / words.size,
        pack=per_call(lambda: pack(packed_words, 11)) / words.size,
        unpack=per_call(lambda: unpack(packed, 11, words.size)) / words.size,
    )


def counted(n: int, parameters: int, units: Units) -> Cost:
    """Computes a round's cost: the protocol's operations times their units, with ring words of 16 bits."""
    chosen = choose_thresholds(n, MAX_CORRUPT, MAX_DROPOUT)
    k, t, q = chosen.degree, chosen.threshold, chosen.quorum
    gone = int(DROPOUT * n)
    alive, left = n - gone, k * (1 - DROPOUT)
    ring = packed_size(parameters, (n * ((1 << BITS) - 1)).bit_length())
    client = (
        units.verify * (n + q)
        + units.agree * 2 * k
        + units.derive * (2 + SEGMENTS) * k
        + units.encrypted_share * 2 * k
        + units.multiply * 2 * k * t
        + units.mask * (k + 1) * parameters
        + units.pack * parameters
    )
    server = (
        units.verify * 2 * n
        + units.unpack * alive * parameters
        + units.multiply * (n * t + t * t)
        + units.derive * SEGMENTS * (alive + gone * left)
        + units.agree * gone * left
        + units.mask * (alive + gone * left) * parameters
    )
    up = ENCRYPTED_SHARE_BYTES * k + 32 * k + ring + 600
    down = (ENTRY_BYTES + 17) * n + ENCRYPTED_SHARE_BYTES * k + 66 * q + 6 * n
    return Cost(n, client, server, up, down)


def per_call(work: Callable[[], object], least: float = 0.1) -> float:
    """Measures the CPU seconds of one call, averaged over at least `least` seconds of calls after one to warm up."""
    work()
    calls, start = 0, time.process_time()
    while time.process_time() - start < least:
        work()
        calls += 1
    return (time.process_time() - start) / calls


if __name__ == "__main__":
    main()
