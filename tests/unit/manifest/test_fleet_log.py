"""The fleet's log: only its owner extends it, nobody shortens or changes it, and it expires."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.errors import PeerError
from fedtune.core.manifest.fleet_log import Change, Fleet, append, extended, replay
from fedtune.core.manifest.joining import DeviceKeys, JoinRequest, PrivateKeys
from fedtune.core.manifest.signed import Signed
from fedtune.core.secagg.identity import Identity

OWNER, THIEF = Identity(b"\x01" * 32), Identity(b"\x02" * 32)
KEYS = {name: PrivateKeys.generate().public for name in ("ada", "bob", "eve", "ghost")}
LATER = 2e9


def log_of(*changes: Change, key: Identity = OWNER) -> tuple[bytes, Fleet]:
    log, fleet = b"", Fleet(OWNER.public)
    for change in changes:
        log, fleet = append(log, fleet, key, change, LATER)
    return log, fleet


def approve(*names: str) -> Change:
    return Change({name: KEYS[name] for name in names})


def test_a_log_replays_to_the_fleet_that_its_owner_made() -> None:
    log, fleet = log_of(Change(), approve("ada", "bob"), Change(revoked=("ada",)), approve("eve"))
    assert replay(log, OWNER.public) == fleet
    assert sorted(fleet.devices) == ["bob", "eve"]
    assert fleet.roster.keys["bob"] == KEYS["bob"].identity
    assert (fleet.number, fleet.expires) == (4, LATER)


@given(st.lists(st.sampled_from(["ada", "bob", "eve"]), max_size=8))
@settings(max_examples=30)
def test_whatever_is_approved_and_revoked_every_beginning_is_extended_by_the_whole(names: list[str]) -> None:
    log, fleet, beginnings = b"", Fleet(OWNER.public), [b""]
    for name in names:
        change = Change(revoked=(name,)) if name in fleet.devices else approve(name)
        log, fleet = append(log, fleet, OWNER, change, LATER)
        beginnings.append(log)
    for held in beginnings:
        assert extended(held, log, OWNER.public) == fleet
        if held != log:
            with pytest.raises(PeerError, match="older than the one that this side holds"):
                extended(log, held, OWNER.public)


def test_an_entry_of_somebody_else_is_refused() -> None:
    log, fleet = log_of(approve("ada"))
    with pytest.raises(PeerError, match="not signed with this fleet's key"):
        append(log, fleet, THIEF, approve("ghost"), LATER)
    forged, _ = append(b"", Fleet(THIEF.public), THIEF, approve("ghost"), LATER)
    for lie in (forged, log + forged):
        with pytest.raises(PeerError, match="not signed with this fleet's key"):
            replay(lie, OWNER.public)


def test_an_entry_left_out_or_moved_or_repeated_is_noticed() -> None:
    log, _ = log_of(Change(), approve("ada"), approve("bob"))
    one, two, three = log.splitlines(keepends=True)
    for lie in (one + three, two + one + three, one + two + two, two, one + two + three + three):
        with pytest.raises(PeerError, match="does not follow entry"):
            replay(lie, OWNER.public)


def test_a_log_without_its_last_byte_is_no_whole_one_though_its_last_entry_can_be_read() -> None:
    log, _ = log_of(Change(), approve("ada"))
    with pytest.raises(PeerError, match="the fleet's log is cut off"):
        replay(log[:-1], OWNER.public)


def test_a_second_history_that_the_owner_signed_too_is_refused_by_who_holds_the_first() -> None:
    """For example after the owner's folder was restored from a backup: devices do not follow silently."""
    first, _ = log_of(Change(), approve("ada"))
    second, _ = log_of(Change(), approve("eve"), approve("bob"))
    with pytest.raises(PeerError, match="an entry was changed or taken back"):
        extended(first, second, OWNER.public)


def test_a_log_expires() -> None:
    _, fleet = log_of(Change())
    fleet.check_fresh(LATER - 1)
    for now in (LATER, LATER + 1, float("nan")):
        with pytest.raises(PeerError, match="has expired"):
            fleet.check_fresh(now)


def test_a_key_that_rotates_signs_what_follows_and_the_old_one_no_more() -> None:
    log, fleet = log_of(approve("ada"), Change(next_key=THIEF.public))
    assert fleet.key == THIEF.public
    with pytest.raises(PeerError, match="not signed with this fleet's key"):
        append(log, fleet, OWNER, approve("bob"), LATER)
    longer, after = append(log, fleet, THIEF, approve("bob"), LATER)
    assert replay(longer, OWNER.public) == after


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (approve("ada"), "there is a device of this name"),
        (Change(revoked=("bob",)), "bob: no such device"),
        (Change({"../eve": KEYS["eve"]}), "a device's name has"),
        (Change({"eve": KEYS["ada"]}), "two devices have the same key"),
        (Change({"eve": DeviceKeys(KEYS["ada"].identity, KEYS["eve"].node)}), "have the same key"),
        (Change({"eve": DeviceKeys(b"\0" * 31, KEYS["eve"].node)}), "a device's keys are malformed"),
        (Change({"eve": DeviceKeys(KEYS["eve"].identity, b"\x05" * 33)}), "a device's keys are malformed"),
        (Change(next_key=b"short"), "a fleet's key has 32 bytes"),
    ],
)
def test_a_change_that_contradicts_the_fleet_is_refused_though_the_owner_signs_it(
    change: Change, complaint: str
) -> None:
    log, fleet = log_of(approve("ada"))
    with pytest.raises(PeerError, match=complaint):
        append(log, fleet, OWNER, change, LATER)


@given(st.data())
@settings(max_examples=150)
def test_no_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    log, fleet = LOG
    changed = bytearray(log)
    changed[data.draw(st.integers(0, len(log) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PeerError):
        extended(log, bytes(changed), OWNER.public)
    try:
        found = replay(bytes(changed), OWNER.public)
    except PeerError:
        return
    assert found.devices == fleet.devices  # another way to write the same JSON


LOG = log_of(Change(), approve("ada", "bob"))


def test_signed_nonsense_is_refused() -> None:
    content = json.loads(LOG[0].splitlines()[0])["content"]
    nonsense: tuple[dict[str, Any], ...] = (
        {"approved": []},
        {"approved": {"ada": 3}},
        {"expires": "later"},
        {"revoked": 3},
        {"next_key": 3},
    )
    for changes in nonsense:
        line = Signed.sign(OWNER, "fleet entry", {**content, **changes}).to_bytes()
        with pytest.raises(PeerError, match="entry 1 of the fleet's log"):
            replay(line, OWNER.public)
    with pytest.raises(PeerError, match="a fleet entry has"):
        replay(Signed.sign(OWNER, "fleet entry", {"number": 1}).to_bytes(), OWNER.public)


def test_a_request_to_join_is_its_maker_s_and_its_code_depends_on_all_of_it() -> None:
    keys = PrivateKeys.generate()
    request = JoinRequest.make("kitchen", keys)
    read = JoinRequest.from_bytes(request.to_bytes())
    assert (read, read.code) == (request, request.code)
    assert len(request.code) == 19
    public, theirs = keys.public, PrivateKeys.generate().public
    other = JoinRequest("kitchen", theirs, request.signature)
    mixed = (DeviceKeys(public.identity, theirs.node), DeviceKeys(theirs.identity, public.node))
    others = [JoinRequest.make("garden", keys), other, *(JoinRequest("kitchen", each, b"") for each in mixed)]
    assert len({each.code for each in (request, *others)}) == 5
    for lie in (other.to_bytes(), request.to_bytes().replace(b"kitchen", b"kitchem"), b"{}", b"[" * 2000, b"x" * 3000):
        with pytest.raises(PeerError, match="expected a device's request to join"):
            JoinRequest.from_bytes(lie)


def test_a_device_s_request_key_has_the_bytes_that_flower_compares() -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from fedtune.core.manifest.joining import load_node_key

    keys = PrivateKeys.generate()
    public = load_node_key(keys.node).public_key()
    assert keys.public.node_pem == public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
