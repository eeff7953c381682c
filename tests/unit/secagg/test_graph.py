"""Thresholds agree with the published table, and graphs have their properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.errors import JobError
from fedtune.core.secagg.graph import Graph, Thresholds, choose_thresholds, majority, part, problems, sparse_parameters

COHORTS = (100, 300, 1000, 10_000)
TABLE = [  # malicious server, corrupt, dropout, degree/threshold for each of COHORTS
    (False, 0.1, 0.1, [(22, 11), (36, 21), (48, 27), (54, 31)]),
    (False, 0.1, 0.3, [(34, 11), (66, 26), (88, 36), (108, 44)]),
    (True, 0.1, 0.1, [(32, 22), (66, 46), (96, 67), (122, 85)]),
    (True, 0.1, 0.2, [(52, 32), (118, 75), (194, 124), (280, 179)]),
    (True, 0.1, 0.3, [(72, 42), (186, 109), (414, 247), (778, 465)]),
]


@pytest.mark.parametrize(("lying", "corrupt", "dropout", "expected"), TABLE)
def test_degree_and_threshold_are_those_of_the_table(
    lying: bool, corrupt: float, dropout: float, expected: list[tuple[int, int]]
) -> None:
    assert [sparse_parameters(n, corrupt, dropout, lying) for n in COHORTS] == expected


@settings(deadline=None)
@given(st.integers(2, 200), st.sampled_from([0.0, 0.1, 0.2]), st.sampled_from([0.0, 0.1, 0.2, 0.3]))
def test_complete_graphs_leave_no_room_for_both_shares_and_enough_survivors(
    n: int, corrupt: float, drop: float
) -> None:
    try:
        chosen = choose_thresholds(n, corrupt, drop)
    except JobError:
        assert majority(n, max(1, part(corrupt, n))) > n - part(drop, n)
        return
    assert chosen.complete
    assert 2 * chosen.threshold > n + max(1, part(corrupt, n))
    assert chosen.threshold == chosen.quorum <= chosen.minimum == n - part(drop, n)
    assert problems(chosen, corrupt) == []


@pytest.mark.parametrize("dropout", [0.1, 0.3])
def test_what_the_server_chooses_above_the_complete_graph_passes_the_clients_own_check(dropout: float) -> None:
    chosen = choose_thresholds(300, 0.1, dropout)
    assert not chosen.complete
    assert problems(chosen, 0.1) == []


def test_parameters_that_cannot_be_met_are_refused_with_the_nearest_that_can() -> None:
    with pytest.raises(JobError, match=r"at most 4 of 10 may drop out, so max_dropout = 0\.4"):
        choose_thresholds(10, 0.1, 0.6)
    assert choose_thresholds(10, 0.1, 0.4).threshold == 6


@pytest.mark.parametrize("cohort", [10_001, 1 << 63])
def test_a_cohort_that_no_round_can_have_is_refused_before_anything_is_computed_for_it(cohort: int) -> None:
    with pytest.raises(JobError, match="too large for one sum; expected at most 10000"):
        choose_thresholds(cohort, 0.1, 0.3)


@pytest.mark.parametrize(
    ("thresholds", "complaint"),
    [
        (Thresholds(10, 9, 5, 6, 7), "threshold 5 of 10"),
        (Thresholds(10, 9, 6, 5, 7), "quorum 5 of 10"),
        (Thresholds(10, 9, 6, 6, 5), "minimum of 5"),
        (Thresholds(300, 186, 108, 166, 210), "threshold 108"),
        (Thresholds(300, 30, 30, 166, 210), "connected"),
        (Thresholds(300, 187, 109, 166, 210), "even"),
    ],
)
def test_a_client_sees_what_is_unsafe_in_thresholds(thresholds: Thresholds, complaint: str) -> None:
    assert any(complaint in problem for problem in problems(thresholds, 0.1))


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 60), st.integers(1, 20), st.binary(min_size=4, max_size=4))
def test_graphs_are_symmetric_regular_and_connected(n: int, half: int, seed: bytes) -> None:
    graph = Graph(range(n), 2 * half, seed)
    for client in range(n):
        assert len(graph.neighbours(client)) == min(2 * half, n - 1)
        assert all(client in graph.neighbours(other) for other in graph.neighbours(client))
        assert client not in graph.neighbours(client)
        assert (client in graph.holders(client)) == graph.complete
    reached, frontier = {0}, {0}
    while frontier:
        frontier = {other for client in frontier for other in graph.neighbours(client)} - reached
        reached |= frontier
    assert len(reached) == n


def test_another_seed_gives_other_neighbours() -> None:
    assert Graph(range(300), 20, b"a").neighbours(0) != Graph(range(300), 20, b"b").neighbours(0)


def test_a_client_index_outside_the_graph_has_no_neighbours() -> None:
    assert Graph([1, 2, 3], 2, b"").neighbours(0) == frozenset()
