"""Identity keys and rosters."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.core.errors import InputError
from fedtune.core.secagg import Identity, Roster
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
