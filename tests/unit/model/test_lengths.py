"""The lengths of a population's examples in tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.job.settings import DataSettings
from fedtune.data import lengths as module
from fedtune.data.lengths import Lengths, places
from fedtune.data.population import Population


def population(folder: Path, sizes: dict[str, int]) -> Population:
    for name, records in sizes.items():
        rows = [{"prompt": f"turn on {row}", "completion": "lamp " * row} for row in range(1, records + 1)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Population(DataSettings(str(folder / "*.jsonl")), seed=0)


def test_lengths_are_those_of_uncut_examples(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    found = Lengths.of(population(tmp_path, {"a": 20, "b": 1}), make_tokenizer(), sequence_length=16)
    assert (found.measured, found.records, found.cleaning.read) == (21, 21, 21)
    assert found.median < found.high <= found.longest
    assert found.longest > 16
    assert found.cleaning.too_long > 0


def test_a_client_of_which_nothing_fits_is_named(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    clients = population(tmp_path, {"a": 20, "b": 1})
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "p", "completion": "lamp " * 50}) + "\n")
    assert Lengths.of(clients, make_tokenizer(), sequence_length=16).unusable == ("b",)


def test_of_many_records_every_so_many_th_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    monkeypatch.setattr(module, "MOST_MEASURED", 10)
    found = Lengths.of(population(tmp_path, {"a": 20, "b": 5}), make_tokenizer(), sequence_length=64)
    assert (found.measured, found.records) == (9, 25)


@pytest.mark.parametrize(("count", "expected"), [(1, (0, 0, 0)), (20, (10, 19, 19)), (100, (50, 95, 99))])
def test_quantiles_are_values_that_occur(count: int, expected: tuple[int, int, int]) -> None:
    assert places(count) == expected
