"""Identity keys, rosters and the log of served rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.core.errors import InputError
from fedtune.core.secagg import FileRoundLog, Identity, Roster, RoundMark
from fedtune.core.secagg.primitives import framed


def test_an_identity_survives_its_file_which_only_its_owner_can_read(tmp_path: Path) -> None:
    identity = Identity.generate()
    identity.save(tmp_path / "identity")
    assert (tmp_path / "identity").stat().st_mode & 0o777 == 0o600
    assert Identity.load(tmp_path / "identity").public == identity.public


def test_an_identity_that_others_may_read_is_refused(tmp_path: Path) -> None:
    Identity.generate().save(tmp_path / "identity")
    (tmp_path / "identity").chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        Identity.load(tmp_path / "identity")


@pytest.mark.parametrize("content", [b"", b"zz" * 32, b"00" * 31, b"00" * 33, b"\xff" * 64])
def test_a_file_that_is_no_identity_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match="identity key"):
        Identity.load(path)


def test_a_private_key_never_shows_in_a_repr() -> None:
    identity = Identity(b"\x07" * 32)
    assert "07" * 8 not in repr(identity)
    assert repr(identity).startswith("Identity(public=")


def test_a_roster_verifies_only_what_its_own_client_signed() -> None:
    mine, other = Identity.generate(), Identity.generate()
    roster = Roster({"mine": mine.public, "other": other.public})
    statement = framed("advertise", b"keys")
    assert roster.verify("mine", statement, mine.sign(statement))
    assert not roster.verify("mine", statement, other.sign(statement))
    assert not roster.verify("mine", framed("vote", b"keys"), mine.sign(statement))
    assert not roster.verify("stranger", statement, mine.sign(statement))


def test_a_roster_s_digest_is_that_of_its_keys_in_whichever_order() -> None:
    keys = {"b": Identity.generate().public, "a": Identity.generate().public}
    assert Roster(dict(sorted(keys.items()))).digest == Roster(keys).digest
    assert Roster(keys | {"a": Identity.generate().public}).digest != Roster(keys).digest


def test_one_key_under_two_names_is_refused() -> None:
    key = Identity.generate().public
    with pytest.raises(InputError, match="same key"):
        Roster({"a": key, "b": key})


def test_a_round_log_remembers_each_job_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "rounds.json"
    assert FileRoundLog(path).last("a") is None
    FileRoundLog(path).record("a", RoundMark(3, 1))
    FileRoundLog(path).record("b", RoundMark(1, 0))
    assert FileRoundLog(path).last("a") == RoundMark(3, 1)
    assert FileRoundLog(path).last("b") == RoundMark(1, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["rounds.json"]


@pytest.mark.parametrize("content", ["", "null", "{", '{"a": 1}', '{"a": [1]}', '{"a": ["1", 2]}', '{"a": [true, 0]}'])
def test_a_spoilt_round_log_is_an_error_and_never_an_empty_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rounds.json"
    path.write_text(content)
    with pytest.raises(InputError, match="round log"):
        FileRoundLog(path).last("a")
    with pytest.raises(InputError, match="round log"):
        FileRoundLog(path).record("a", RoundMark(9, 0))
    assert path.read_text() == content


def test_a_round_log_never_grows_so_large_that_it_cannot_be_read(tmp_path: Path) -> None:
    """The server names a new job for every round, with names of the greatest length."""
    log, marks = FileRoundLog(tmp_path / "rounds.json"), dict[str, RoundMark]()
    name = "\U0001f600" * 122
    for number in range(600):
        marks[f"{number:06d}{name}"] = RoundMark(1, 0)
    (tmp_path / "rounds.json").write_text(json.dumps(marks))

    def name_more_jobs() -> None:
        for number in range(600, 800):
            log.record(f"{number:06d}{name}", RoundMark(1, 0))

    with pytest.raises(InputError, match=r"the round log is full after 6\d\d jobs"):
        name_more_jobs()
    log.record(f"000000{name}", RoundMark(2, 0))
    assert log.last(f"000000{name}") == RoundMark(2, 0)
    assert log.last(f"000001{name}") == RoundMark(1, 0)


def test_later_attempts_and_rounds_compare_greater() -> None:
    assert RoundMark(1, 0) < RoundMark(1, 1) < RoundMark(2, 0)


def test_files_are_plain_json(tmp_path: Path) -> None:
    FileRoundLog(tmp_path / "log").record("job", RoundMark(4, 2))
    assert json.loads((tmp_path / "log").read_text()) == {"job": [4, 2]}
