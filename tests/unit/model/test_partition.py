"""Partitions assign every record to one client, reproducibly by seed, and leave no client empty."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fedtune.core.errors import JobError
from fedtune.data.population import partition_records
from fedtune.data.records import Record

RECORDS = [Record(str(number), fields={"skill": ["lamp", "fan", "oven"][number % 3]}) for number in range(120)]


@given(
    partition=st.sampled_from(["iid", "dirichlet:100", "dirichlet:100:skill", "by-field:skill"]),
    clients=st.integers(1, 12),
    seed=st.integers(0, 1 << 62),
)
def test_every_record_has_one_client_and_every_client_a_record(partition: str, clients: int, seed: int) -> None:
    dealt = partition_records(RECORDS, partition, clients, seed)
    assert len(dealt) == (3 if partition == "by-field:skill" else clients)
    assert all(dealt.values())
    assert sorted(int(record.completion) for held in dealt.values() for record in held) == list(range(120))
    assert dealt == partition_records(RECORDS, partition, clients, seed)


def test_iid_shares_differ_by_one_record_at_most() -> None:
    sizes = [len(held) for held in partition_records(RECORDS, "iid", 7, 0).values()]
    assert max(sizes) - min(sizes) <= 1


def test_a_client_of_a_field_holds_only_its_value() -> None:
    dealt = partition_records(RECORDS, "by-field:skill", 99, 0)
    assert list(dealt) == ["fan", "lamp", "oven"]
    assert all(record.fields["skill"] == name for name, held in dealt.items() for record in held)


def test_a_small_alpha_makes_clients_less_alike() -> None:
    def largest_share(alpha: str) -> float:
        dealt = partition_records(RECORDS, f"dirichlet:{alpha}:skill", 4, 3)
        shares = [
            max(sum(record.fields["skill"] == skill for record in held) for skill in ("lamp", "fan", "oven"))
            / len(held)
            for held in dealt.values()
        ]
        return sum(shares) / len(shares)

    assert largest_share("0.3") > largest_share("1000") + 0.1


def test_another_seed_deals_otherwise() -> None:
    assert partition_records(RECORDS, "iid", 4, 0) != partition_records(RECORDS, "iid", 4, 1)


@pytest.mark.parametrize(
    ("partition", "clients", "problem"),
    [
        ("iid", 121, "data.clients is 121, but there are only 120 records"),
        ("dirichlet:0.001", 50, "raise ALPHA"),
        ("dirichlet:0", 2, "expected ALPHA above 0"),
        ("by-field:room", 2, 'goes by "room", but record 1 has no such field, only skill'),
        ("dirichlet:1:room", 2, "no such field"),
    ],
)
def test_a_partition_that_cannot_be_says_why(partition: str, clients: int, problem: str) -> None:
    with pytest.raises(JobError, match=problem):
        partition_records(RECORDS, partition, clients, 0)
