"""A round of Flower's SecAgg+, composed of the functions that its client mod and its workflow call.

All clients of the cohort make keys; `sample` of them go through the client's four stages for real, with the shares
from all their peers. The server's work is measured one unit of each kind at a time (adding a masked vector, combining
the shares of a secret, expanding and removing a mask) and multiplied by how often `SecAggPlusWorkflow` does it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import ConfigRecord, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_subtraction
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from numpy.typing import NDArray
from round_cost import Clock, Cost

CLIPPING, TARGET, MODULUS, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000  # the workflow's defaults

Floats = NDArray[np.float64]


def flower_round(updates: list[Floats], dropouts: int, threshold: int, sample: int) -> Cost:
    """Runs one round with a complete graph, whose last `dropouts` clients vanish after they have shared their keys."""
    cost = Cost(clients=len(updates))
    states, keys = _keys(len(updates), threshold)
    masked = _clients(cost, states, keys, updates, dropouts, sample)
    _server(cost, states, keys, masked, dropouts, threshold, sample)
    cost.error = _error(updates[: len(updates) - dropouts])
    return cost


def _keys(n: int, threshold: int) -> tuple[dict[int, SecAggPlusState], dict[int, dict[str, Any]]]:
    states = {nid: SecAggPlusState() for nid in range(1, n + 1)}
    return states, {nid: _setup(state, _configuration(n, threshold)) for nid, state in states.items()}


def _configuration(n: int, threshold: int) -> ConfigRecord:
    return ConfigRecord(
        {
            Key.SAMPLE_NUMBER: n,
            Key.SHARE_NUMBER: n,
            Key.THRESHOLD: threshold,
            Key.CLIPPING_RANGE: CLIPPING,
            Key.TARGET_RANGE: TARGET,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: float(MAX_WEIGHT),
        }
    )


def _clients(
    cost: Cost,
    states: dict[int, SecAggPlusState],
    keys: dict[int, dict[str, Any]],
    updates: list[Floats],
    dropouts: int,
    sample: int,
) -> list[bytes]:
    """Runs some clients and returns one masked vector in its wire form."""
    ids = list(states)
    alive, dead = ids[: len(ids) - dropouts], ids[len(ids) - dropouts :]
    listed = ConfigRecord({str(nid): [key[Key.PUBLIC_KEY_1], key[Key.PUBLIC_KEY_2]] for nid, key in keys.items()})
    asked = ConfigRecord({Key.ACTIVE_NODE_ID_LIST: alive, Key.DEAD_NODE_ID_LIST: dead})
    setup = _configuration(len(ids), states[1].threshold)
    seconds = []
    for nid in alive[:sample]:
        clock, state, update = Clock(), SecAggPlusState(), ndarrays_to_parameters([updates[nid - 1]])
        state.nid = nid
        with clock:
            own = _setup(state, setup)
        listed[str(nid)] = [cast(bytes, own[name]) for name in (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2)]
        state.rd_seed_share_dict, state.sk1_share_dict, state.ss2_dict = {}, {}, {}
        with clock:
            encrypted_shares = _share_keys(state, listed)
        received = _encrypted_shares_for(state, [other for other in ids if other != nid])
        with clock:
            masked = _collect_masked_vectors(state, received, MAX_WEIGHT, update)
            revealed = _unmask(state, asked)
        seconds.append(clock.seconds)
    cost.client = statistics.median(seconds)
    cost.up = _size([own, encrypted_shares, masked, revealed])
    cost.down = _size([setup, listed, received, asked])
    return cast(list[bytes], masked[Key.MASKED_PARAMETERS])


def _encrypted_shares_for(state: SecAggPlusState, others: list[int]) -> ConfigRecord:
    """Makes an encrypted share from every peer, as the peer would, with shares of the right size."""
    shares = state.rd_seed_share_dict[state.nid], state.sk1_share_dict[state.nid]
    plaintexts = [share_keys_plaintext_concat(other, state.nid, *shares) for other in others]
    sealed = [encrypt(state.ss2_dict[other], text) for other, text in zip(others, plaintexts, strict=True)]
    return ConfigRecord({Key.SOURCE_LIST: others, Key.CIPHERTEXT_LIST: sealed})


def _server(
    cost: Cost,
    states: dict[int, SecAggPlusState],
    keys: dict[int, dict[str, Any]],
    masked: list[bytes],
    dropouts: int,
    threshold: int,
    sample: int,
) -> None:
    n, alive = len(states), len(states) - dropouts
    add, seed, key, own, pair = (Clock() for _ in range(5))
    total = [bytes_to_ndarray(part) for part in masked]
    shapes = [part.shape for part in total]
    for _ in range(sample):
        with add:
            total = parameters_addition(total, [bytes_to_ndarray(part) for part in masked])
        for clock, secret in ((seed, os.urandom(32)), (key, states[1].sk1)):
            shares = create_shares(secret, threshold, n)[:alive]
            with clock:
                combine_shares(shares)
        with own:
            total = parameters_subtraction(total, pseudo_rand_gen(os.urandom(32), MODULUS, shapes))
        with pair:
            shared = generate_shared_key(
                bytes_to_private_key(states[1].sk1), bytes_to_public_key(keys[2][Key.PUBLIC_KEY_1])
            )
            total = parameters_subtraction(total, pseudo_rand_gen(shared, MODULUS, shapes))
    pairs = dropouts * (n - 1)  # the workflow expands masks between two dropouts, too
    counts = ((add, alive), (seed, alive), (key, dropouts), (own, alive), (pair, pairs))
    cost.server = sum(clock.seconds / sample * count for clock, count in counts)


def _error(updates: list[Floats]) -> float:
    """Returns the sum's error from quantizing to 2^22 steps over ±8; the masks cancel modulo 2^32."""
    quantized, expected = np.zeros(updates[0].shape, np.int64), np.zeros(updates[0].shape)
    for update in updates:
        quantized += quantize([update], CLIPPING, TARGET)[0]
        expected += update
    total = dequantize([quantized], CLIPPING, TARGET)[0] - (len(updates) - 1) * CLIPPING
    return float(np.linalg.norm(total - expected) / np.linalg.norm(expected))


def _size(part: object) -> int:
    """Returns the payload bytes: byte strings by length, numbers as 8 bytes."""
    if isinstance(part, bytes):
        return len(part)
    if isinstance(part, int | float):
        return 8
    if isinstance(part, dict | ConfigRecord):
        return _size(part.values())
    assert isinstance(part, Iterable)
    return sum(_size(value) for value in part)
