"""Balanced epochs: the classes of a client's examples appear equally often in its local training (data.balance).

    drawn = balanced_epoch([0, 0, 0, 0, 0, 1], seed, epoch)     # of six examples, class 1 is drawn three times

An epoch keeps its size, so that steps, time and plans stay what they are without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedtune.core.seeds import generator

MOST_REPEATS = 4  # of an example in an epoch; a few rare ones would otherwise be learned by heart


def balanced_epoch(classes: Sequence[int], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Draws the examples of an epoch.

    Of a class with n_c examples and the quota q_c, each is drawn ⌊q_c / n_c⌋ times, and q_c mod n_c of them once more,
    other ones in every epoch. Where all are of one class, each is drawn once.

    Args:
        classes: class of each example, numbers from 0.

    Returns:
        Indices of examples, as many as there are examples, in ascending order.
    """
    labels = np.asarray(classes, dtype=np.int64)
    members = {label: np.flatnonzero(labels == label) for label in np.unique(labels).tolist()}
    asked = quotas({label: len(own) for label, own in members.items()})
    random = generator(seed, "balance", epoch)
    times = np.zeros(len(labels), dtype=np.int64)
    for label, own in members.items():
        whole, rest = divmod(asked[label], len(own))
        times[own] = whole
        times[random.permutation(own)[:rest]] += 1
    return np.repeat(np.arange(len(labels)), times)


def quotas(counts: Mapping[int, int]) -> dict[int, int]:
    """Returns how many examples of each class an epoch has.

        q_c = min(4 n_c, w),  with w such that  Σ q_c = Σ n_c

    That is an equal share for each class, or four times its examples where these are fewer; the other classes share the
    difference equally. Remainders of the division go to the largest classes.

    Args:
        counts: class -> n_c, the number of its examples, at least 1.
    """
    left, result = sum(counts.values()), {}
    ascending = sorted(counts, key=lambda label: (counts[label], label))
    for number, label in enumerate(ascending):
        result[label] = min(MOST_REPEATS * counts[label], left // (len(ascending) - number))
        left -= result[label]
    return result
