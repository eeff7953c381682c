"""Seeds that are bound to what they are for, so that no two random streams are ever the same by accident."""

from __future__ import annotations

import hashlib

import numpy as np

SEED_BITS = 63  # what torch.manual_seed and a TOML integer both hold


def derive_seed(job_seed: int, purpose: str, *indices: int | str) -> int:
    """Derives the seed of one random stream.

    seed = first 63 bits of SHA-256("fedtune-seed" ‖ job_seed ‖ purpose ‖ indices)

    Args:
        job_seed: the job's `training.seed`.
        purpose: what the stream is for, e.g. "train" or "cohort".
        indices: what tells streams of one purpose apart, e.g. round and client.

    Returns:
        A non-negative integer below 2**63, the same on every platform.
    """
    text = "\x1f".join(["fedtune-seed", str(job_seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - SEED_BITS)


def generator(job_seed: int, purpose: str, *indices: int | str) -> np.random.Generator:
    """A numpy generator on the stream that `derive_seed` names."""
    return np.random.Generator(np.random.Philox(derive_seed(job_seed, purpose, *indices)))
