"""A live device enforces bounds by itself against its server, across `leave` and a new `join`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.client.client_commands import leave
from fedtune.client.live.device_home import ROUNDS, ClientHome
from fedtune.core.errors import InputError
from fedtune.core.manifest.joining import Invitation
from fedtune.core.secagg import Identity, RoundMark, Served

INVITATION = Invitation("localhost:8443", "", Identity(b"\x01" * 32).public)
OTHER_FLEET = replace(INVITATION, fleet_key=Identity(b"\x02" * 32).public)


def joined(folder: Path, name: str = "ada", invitation: Invitation = INVITATION) -> ClientHome:
    data = folder / "mine.jsonl"
    data.write_text('{"text": "a"}\n')
    return ClientHome.join(folder / "device", invitation, name, data)


def test_a_device_that_leaves_and_joins_its_fleet_again_knows_what_it_has_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = joined(tmp_path)
    first.round_log.record("job", Served().masked(3))
    leave(first.path)
    assert f"kept {first.path / ROUNDS}" in capsys.readouterr().out
    assert [each.name for each in first.path.iterdir()] == [ROUNDS]
    again = joined(tmp_path, "bob")
    assert again.round_log.of("job").last > RoundMark(3, 0)
    leave(again.path)
    assert joined(tmp_path, invitation=OTHER_FLEET).round_log.of("job") == Served()


def test_a_device_that_served_nothing_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = joined(tmp_path)
    assert home.round_log.of("job") == Served()
    leave(home.path)
    assert not home.path.exists()
    assert "kept" not in capsys.readouterr().out
    with pytest.raises(InputError, match="there is no device here"):
        leave(home.path)


def test_a_folder_that_cannot_be_read_can_be_left_and_stays_a_log(tmp_path: Path) -> None:
    home = joined(tmp_path)
    home.round_log.record("job", Served().masked(3))
    (home.path / "device.json").write_text("{}")
    with pytest.raises(InputError, match="leave and join again"):
        ClientHome(home.path)
    leave(home.path)
    assert joined(tmp_path).round_log.of("job").sums == 1
