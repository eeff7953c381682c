"""Messages have exactly one encoding, and everything else is refused with a reason."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.errors import PeerError
from fedtune.core.secagg import exchanged as messages
from fedtune.core.secagg.exchanged import (
    Advertisement,
    Delivery,
    EncryptedShares,
    KeyEntry,
    KeyList,
    MaskedInput,
    Message,
    Quorum,
    Reveal,
    Survivors,
    Vote,
    decode,
    encode,
    increasing,
)

LIMIT = 1 << 20
digests = st.binary(min_size=32, max_size=32)
signatures = st.binary(min_size=64, max_size=64)
client_indices = st.integers(0, messages.MAX_COHORT - 1)
index_lists = st.lists(client_indices, max_size=5).map(tuple)
entries = st.builds(KeyEntry, client_indices, digests, digests, signatures)
EVERY_MESSAGE = st.one_of(
    st.builds(Advertisement, digests, digests, digests, signatures),
    st.builds(KeyList, digests, st.lists(entries, max_size=3).map(tuple)),
    st.builds(EncryptedShares, digests, digests, st.binary(max_size=200)),
    st.builds(Delivery, digests, index_lists, st.binary(max_size=200)),
    st.builds(MaskedInput, digests, st.lists(st.binary(max_size=20), max_size=4).map(tuple)),
    st.builds(Survivors, digests, index_lists),
    st.builds(Vote, digests, signatures),
    st.builds(Quorum, digests, index_lists, st.binary(max_size=200)),
    st.builds(Reveal, digests, st.binary(max_size=200)),
)
KINDS = (Advertisement, KeyList, EncryptedShares, Delivery, MaskedInput, Survivors, Vote, Quorum, Reveal)


@settings(deadline=None)
@given(EVERY_MESSAGE)
def test_every_message_survives_its_byte_form(message: Message) -> None:
    assert decode(encode(message), type(message), LIMIT) == message


@settings(deadline=None)
@given(EVERY_MESSAGE, st.sampled_from(KINDS))
def test_a_message_is_never_taken_for_another_kind(message: Message, kind: type[Message]) -> None:
    if kind is not type(message):
        with pytest.raises(PeerError, match=kind.__name__):
            decode(encode(message), kind, LIMIT)


@settings(deadline=None)
@given(EVERY_MESSAGE, st.data())
def test_a_message_that_was_cut_or_lengthened_is_refused(message: Message, data: st.DataObject) -> None:
    encoded = encode(message)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    for spoilt in (encoded[:cut], encoded + b"\x00", encoded[1:]):
        with pytest.raises(PeerError):
            decode(spoilt, type(message), LIMIT)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(KINDS))
def test_random_bytes_are_refused_and_nothing_else_is_raised(data: bytes, kind: type[Message]) -> None:
    with pytest.raises(PeerError):
        decode(data, kind, LIMIT)


def test_a_message_over_its_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(PeerError, match="11 bytes, expected at most 10"):
        decode(bytes(11), Vote, 10)


def test_another_byte_form_of_the_same_message_is_refused() -> None:
    encoded = encode(Survivors(bytes(32), (1, 2)))
    wider = encoded.replace(b"\x92\x01\x02", b"\x92\xcc\x01\x02")  # 1 as a two-byte number
    assert msgspec.msgpack.decode(wider) == msgspec.msgpack.decode(encoded)
    with pytest.raises(PeerError, match="one form"):
        decode(wider, Survivors, LIMIT)


def test_a_deeply_nested_message_is_refused() -> None:
    with pytest.raises(PeerError):
        decode(b"\x91" * 100_000, Survivors, LIMIT)


@pytest.mark.parametrize(
    "content",
    [
        ["Vote", bytes(31), bytes(64)],
        ["Vote", bytes(32), bytes(65)],
        ["Vote", bytes(32), bytes(64), 0],
        ["Vote", bytes(32)],
        ["Vote", "0" * 32, bytes(64)],
        ["Survivors", bytes(32), [-1]],
        ["Survivors", bytes(32), [messages.MAX_COHORT]],
        ["Survivors", bytes(32), [1.0]],
        ["Survivors", bytes(32), [*range(messages.MAX_COHORT), 0]],
    ],
)
def test_fields_out_of_bounds_are_refused(content: list[object]) -> None:
    kind = Vote if content[0] == "Vote" else Survivors
    with pytest.raises(PeerError, match=kind.__name__):
        decode(msgspec.msgpack.encode(content), kind, LIMIT)


@pytest.mark.parametrize(
    ("listed", "holds"), [((), True), ((3,), True), ((1, 2), True), ((1, 1), False), ((2, 1), False)]
)
def test_lists_of_client_indices_are_strictly_increasing(listed: tuple[int, ...], holds: bool) -> None:
    assert increasing(listed) is holds
