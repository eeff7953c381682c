"""A fleet file: every impossible value is refused with its place, and clients get kinds by share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedtune.core.errors import JobError
from fedtune.core.job.device_kinds import load_fleet
from fedtune.demo import FLEET

KIND = {
    "name": '"phone"',
    "count": "3",
    "memory_mb": "2000",
    "tokens_per_second": "500.0",
    "uplink_kbit": "1000",
    "downlink_kbit": "8000",
}


def write(folder: Path, *kinds: dict[str, str], before: str = "") -> Path:
    path = folder / "fleet.toml"
    tables = ["[[kind]]\n" + "".join(f"{key} = {value}\n" for key, value in kind.items()) for kind in kinds]
    path.write_text(before + "\n".join(tables))
    return path


def test_the_bundled_fleet_has_phones_boards_laptops_and_an_edge_gpu() -> None:
    fleet = load_fleet(FLEET)
    assert sum(kind.count for kind in fleet.kind) == 100
    assert [kind.name for kind in fleet.kind] == ["phone", "single-board computer", "laptop", "edge GPU box"]


def test_a_devices_time_is_work_over_speed_and_bytes_over_bandwidth(tmp_path: Path) -> None:
    (kind,) = load_fleet(write(tmp_path, KIND)).kind
    assert kind.seconds(tokens=1000, bytes_up=125_000, bytes_down=1_000_000) == pytest.approx(2 + 1 + 1)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("count", "0", "count: expected greater than or equal to 1, got 0"),
        ("count", "2.5", "count"),
        ("memory_mb", "-1", "memory_mb: expected greater than 0, got -1"),
        ("tokens_per_second", "0", "tokens_per_second: expected greater than 0"),
        ("tokens_per_second", "nan", "tokens_per_second: expected a finite number"),
        ("uplink_kbit", "inf", "uplink_kbit"),
        ("uplink_kbit", '"fast"', "uplink_kbit"),
        ("availability", "1.5", "availability: expected less than or equal to 1, got 1.5"),
        ("availability", "0", "availability: expected greater than 0"),
        ("failure_rate", "-0.1", "failure_rate"),
        ("jitter", "9", "jitter"),
        ("colour", '"red"', "colour: unknown key; expected one of name, count"),
        ("name", '""', "name"),
        ("count", "1979-05-27", "count"),
    ],
)
def test_an_impossible_value_is_refused_with_its_place(tmp_path: Path, key: str, value: str, complaint: str) -> None:
    path = write(tmp_path, KIND | {"name": '"board"'}, KIND | {key: value})
    with pytest.raises(JobError) as caught:
        load_fleet(path)
    assert f"{path}: kind 2" in str(caught.value)
    assert complaint in str(caught.value)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    broken = {key: value for key, value in KIND.items() if key != "memory_mb"} | {"count": "0"}
    with pytest.raises(JobError) as caught:
        load_fleet(write(tmp_path, KIND, KIND, broken, before="colour = 1\n"))
    text = str(caught.value)
    for part in ("colour: unknown key", "memory_mb: missing", "count: expected", "two kinds are named 'phone'"):
        assert part in text


@pytest.mark.parametrize("text", ["", "kind = 3", "kind = []", "[kind]\nname = 1", "[[kind", "\x00"])
def test_what_is_no_fleet_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(JobError, match=r"fleet\.toml: "):
        load_fleet(path)
    with pytest.raises(JobError, match="cannot be read"):
        load_fleet(tmp_path / "none.toml")


@pytest.mark.parametrize(("clients", "counts"), [(100, [60, 10, 26, 4]), (10, [6, 1, 3, 0]), (1, [1, 0, 0, 0])])
def test_clients_get_kinds_by_share(clients: int, counts: list[int]) -> None:
    fleet = load_fleet(FLEET)
    names = [f"{index:03d}" for index in range(clients)]
    kinds = fleet.assign(names, seed=1)
    dealt = Counter(kind.name for kind in kinds.values())
    assert [dealt[kind.name] for kind in fleet.kind] == counts
    assert kinds == fleet.assign(names[::-1], seed=1)
