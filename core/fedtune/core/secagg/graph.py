"""The communication graph, which pairs clients for masks and shares, and the thresholds that make it safe.

Up to `COMPLETE_UP_TO` clients the graph is complete. Above, it is k-regular: the clients lie on a circle in a random
order, each joined to the k/2 nearest on either side [Bell, Bonawitz, Gascón, Lepoint, Raykova 2020].

A share γ (`corrupt`) of the cohort colludes with the server, never less than one client, and a share δ (`dropout`)
vanishes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import floor, lgamma, log

import numpy as np
from numpy.typing import NDArray

from fedtune.core.errors import JobError
from fedtune.core.secagg.exchanged import MAX_COHORT

COMPLETE_UP_TO = 200
MIN_SURVIVORS = 3  # fewest clients with which a client should agree to be summed, itself included
SECURITY_BITS = 40  # a cohort is unsafe with probability at most 2^-40 ...
ABORT_BITS = 20  # ... and cannot be unmasked, although few enough dropped out, with probability at most 2^-20

_ROUNDING = 1e-9  # in floats, 0.29 * 100 is slightly less than 29


@dataclass(frozen=True)
class Thresholds:
    """The thresholds for a cohort of `cohort` invited clients.

    Attributes:
        degree: k, the number of neighbours with which each client masks and shares; cohort − 1 in the complete graph.
        threshold: t, the number of shares that recover a secret.
        quorum: q, the number of signatures over the same survivor set that a client requires before it reveals shares.
        minimum: n_min, the number of survivors below which a round has no sum.
    """

    cohort: int
    degree: int
    threshold: int
    quorum: int
    minimum: int

    @property
    def complete(self) -> bool:
        return self.degree == self.cohort - 1


def choose_thresholds(cohort: int, corrupt: float, dropout: float) -> Thresholds:
    """Returns the cheapest thresholds that are safe against a lying server.

    Complete graph: t = q = floor((n + max(1, floor(γn)))/2) + 1. Sparse graph: `sparse_parameters`. Always
    n_min = n − floor(δn).

    Raises:
        JobError: the cohort is larger than a round's messages allow; or no thresholds are safe, and the message has the
            nearest parameters that would be.
    """
    if cohort > MAX_COHORT:
        raise JobError([f"a cohort of {cohort} clients is too large for one sum; expected at most {MAX_COHORT}"])
    minimum = cohort - part(dropout, cohort)
    quorum = majority(cohort, colluders(corrupt, cohort))
    if cohort < 2 or quorum > minimum:
        raise JobError([_nearest(cohort, corrupt, dropout)])
    if cohort <= COMPLETE_UP_TO:
        return Thresholds(cohort, cohort - 1, quorum, quorum, minimum)
    sparse = sparse_parameters(cohort, corrupt, dropout)
    if sparse is None:
        return Thresholds(cohort, cohort - 1, quorum, quorum, minimum)
    return Thresholds(cohort, sparse[0], sparse[1], quorum, minimum)


def problems(thresholds: Thresholds, corrupt: float) -> list[str]:
    """Returns the reasons why thresholds are not safe when `corrupt` of the cohort colludes; empty when they are."""
    n, k, t, q = thresholds.cohort, thresholds.degree, thresholds.threshold, thresholds.quorum
    colluding = colluders(corrupt, n)
    found = []
    if q < majority(n, colluding):
        found.append(f"quorum {q} of {n} is below {majority(n, colluding)}: two survivor sets could both find a quorum")
    if thresholds.minimum < q:
        found.append(f"a minimum of {thresholds.minimum} survivors is below the quorum {q}")
    if thresholds.complete:
        if t < majority(n, colluding):
            found.append(
                f"threshold {t} of {n} is below {majority(n, colluding)}: it lets both shares of a client be had"
            )
        return found
    if n <= COMPLETE_UP_TO:
        return [*found, f"degree {k}: a cohort of up to {COMPLETE_UP_TO} needs the complete graph"]
    if k % 2:
        return [*found, f"degree {k} is not an even number"]
    worst = _likely_corrupt_neighbours(n, k, colluding)
    if 2 * t <= k + worst:
        found.append(
            f"threshold {t} at degree {k} is at most {(k + worst) / 2}: it lets both shares of a client be had"
        )
    if not _stays_connected(n, k, min(n, colluding + n - thresholds.minimum)):
        found.append(f"degree {k} is too small for {n} clients: the honest survivors may not be connected")
    return found


@lru_cache(maxsize=64)
def sparse_parameters(cohort: int, corrupt: float, dropout: float, lying_server: bool = True) -> tuple[int, int] | None:
    """Returns the smallest even degree k with its smallest threshold t, or None when only the complete graph would do.

    With n clients, σ = 40 and η = 20:

        disconnection   (n(n−k−1)/2) · [m!(n−k)!] / [n!(m−k)!] <= 2^-(σ+1),   m = floor(γn) + floor(δn)
        collusion       P[Hyp(n, γn, k) >= t] <= 2^-(σ+1) / n
        lying server    2t > k + c,   c the greatest number of corrupt neighbours not excluded by that same tail
        abort           P[Hyp(n, (1−δ)n, k) < t] <= 2^-η / n

    Without a lying server t is the smallest that the collusion condition allows.
    """
    colluding, gone = colluders(corrupt, cohort), part(dropout, cohort)
    for degree in range(2, cohort, 2):
        if not _stays_connected(cohort, degree, colluding + gone):
            continue
        worst = _likely_corrupt_neighbours(cohort, degree, colluding)
        threshold = (degree + worst) // 2 + 1 if lying_server else worst + 1
        too_few = _hypergeometric(cohort, cohort - gone, degree)[:threshold]
        if too_few.sum() <= 2.0**-ABORT_BITS / cohort:
            return degree, threshold
    return None


def part(fraction: float, cohort: int) -> int:
    """Returns floor(fraction · cohort), exact for fractions written in decimals."""
    return floor(fraction * cohort + _ROUNDING)


def colluders(corrupt: float, cohort: int) -> int:
    """Returns the number of clients that may collude with the server: floor(γn), and one in the smallest cohort too."""
    return max(1, part(corrupt, cohort))


def majority(holders: int, colluding: int) -> int:
    """Returns the smallest number with 2·number > holders + colluding.

    Colluding holders may give two different answers, honest ones only one; so only one of the two can have this many.
    """
    return (holders + colluding) // 2 + 1


class Graph:
    """A regular, symmetric graph on some clients of a cohort, which follows from a seed.

    Args:
        clients: indices of the clients in the cohort, distinct.
        degree: k; len(clients) − 1 or more gives the complete graph, otherwise an even number.
        seed: seed of the circle's order by SHA-256(seed ‖ client index), client index as 4 big-endian bytes.
    """

    def __init__(self, clients: Iterable[int], degree: int, seed: bytes) -> None:
        self.clients = tuple(sorted(clients))
        self.complete = degree >= len(self.clients) - 1
        self._reach = degree // 2
        drawn = self.clients if self.complete else sorted(self.clients, key=lambda client: _draw(seed, client))
        self._circle = tuple(drawn)
        self._position = {client: position for position, client in enumerate(self._circle)}

    def neighbours(self, client: int) -> frozenset[int]:
        """Returns the clients joined to this one, without itself; none for a client outside the graph."""
        if client not in self._position:
            return frozenset()
        if self.complete:
            return frozenset(self.clients) - {client}
        here, size = self._position[client], len(self._circle)
        steps = (step for step in range(-self._reach, self._reach + 1) if step)
        return frozenset(self._circle[(here + step) % size] for step in steps)

    def holders(self, owner: int) -> frozenset[int]:
        """Returns the holders of the owner's shares: its neighbours, and in the complete graph also itself.

        In the complete graph every survivor's share may be needed, so the owner keeps one too; the thresholds count it.
        """
        return self.neighbours(owner) | {owner} if self.complete else self.neighbours(owner)


def _draw(seed: bytes, client: int) -> bytes:
    return hashlib.sha256(seed + client.to_bytes(4, "big")).digest()


def _stays_connected(n: int, k: int, missing: int) -> bool:
    """Returns whether the disconnection condition holds with `missing` clients corrupt or gone."""
    if missing < k:
        return True
    clients_apart = lgamma(missing + 1) + lgamma(n - k + 1) - lgamma(n + 1) - lgamma(missing - k + 1)
    pairs = n * (n - k - 1) / 2
    return pairs <= 0 or log(pairs) + clients_apart <= -(SECURITY_BITS + 1) * log(2)


def _likely_corrupt_neighbours(n: int, k: int, colluding: int) -> int:
    """Returns the smallest c with P[Hyp(n, γn, k) > c] <= 2^-(σ+1)/n."""
    allowed = 2.0 ** -(SECURITY_BITS + 1) / n
    tails = np.cumsum(_hypergeometric(n, colluding, k)[::-1])[::-1]  # tails[c] = P[X >= c]
    exceeded = np.flatnonzero(tails > allowed)
    return int(exceeded[-1]) if exceeded.size else 0


def _hypergeometric(n: int, marked: int, drawn: int) -> NDArray[np.float64]:
    """Returns P[X = x] for x = 0 ... drawn, where X counts the marked among `drawn` out of n without replacement."""
    log_factorial = _log_factorials(n)
    x = np.arange(drawn + 1)
    possible = x[(x <= marked) & (drawn - x <= n - marked)]
    logs = (
        log_factorial[marked]
        - log_factorial[possible]
        - log_factorial[marked - possible]
        + log_factorial[n - marked]
        - log_factorial[drawn - possible]
        - log_factorial[n - marked - drawn + possible]
        - (log_factorial[n] - log_factorial[drawn] - log_factorial[n - drawn])
    )
    probabilities = np.zeros(drawn + 1)
    probabilities[possible] = np.exp(logs)
    return probabilities


@lru_cache(maxsize=8)
def _log_factorials(n: int) -> NDArray[np.float64]:
    return np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))


def _nearest(cohort: int, corrupt: float, dropout: float) -> str:
    """Returns the sentence that refuses the parameters and names the nearest ones that can be met."""
    wanted = (
        f"secure aggregation with {cohort} clients cannot stand max_corrupt = {corrupt} and max_dropout = {dropout}"
    )
    spare = cohort - majority(cohort, colluders(corrupt, cohort))
    if cohort < 2:
        return f"{wanted}: at least 2 clients are needed"
    if spare < 0:
        return f"{wanted}: max_corrupt must be below 1"
    return f"{wanted}: at most {spare} of {cohort} may drop out, so max_dropout = {floor(1000 * spare / cohort) / 1000}"
