"""Attacks by clients on the server: each is refused and named, and the sum over the others stays exact."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from rehearsal import Rehearsal, plain_sum, random_updates

from fedtune.core.secagg import ClientFaultError, Identity, RoundAbortedError, Segment, ServerFaultError, Stage
from fedtune.core.secagg.exchanged import (
    ENCRYPTED_SHARE_BYTES,
    Advertisement,
    EncryptedShares,
    MaskedInput,
    Message,
    Reveal,
    Vote,
    decode,
    encode,
)
from fedtune.core.secagg.primitives import Agreement
from fedtune.core.secagg.transcript import advertisement_statement

SEGMENTS = (Segment("v", 16, 13, 1000, (0,)), Segment("weight", 1, 32, 1 << 20, (0,)))
STAGES = (Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.VOTE, Stage.UNMASK)
KINDS = dict(zip(STAGES, ("Advertisement", "EncryptedShares", "MaskedInput", "Vote", "Reveal"), strict=True))
ANY_SIZE = 1 << 24


class Fixture:
    """A cohort up to one exchange, where client-0 turns hostile."""

    def __init__(self, stage: Stage, gone: tuple[int, ...] = (), clients: int = 5) -> None:
        self.rehearsal = Rehearsal.prepare([0] * clients, SEGMENTS)
        self.server = self.rehearsal.server
        self.updates = random_updates(self.server.config)
        self.requests = self.rehearsal.until(stage, self.updates, {Stage.MASK: {f"client-{index}" for index in gone}})

    def honest(self, kind: type[Any], client: str = "client-0") -> Any:
        """Returns the client's honest answer."""
        return decode(self.rehearsal.answer(client, self.requests[client], self.updates), kind, ANY_SIZE)

    def waiting(self) -> frozenset[str]:
        """Returns the clients that the server has asked and that have not answered yet."""
        left = self.server._asked - self.server._answered
        return frozenset(self.server.config.cohort[index].client for index in left)

    def refuses(self, reply: bytes | Message, reason: str) -> None:
        """Checks that the server refuses an answer of client-0, names it, still waits for it, and works without it."""
        waiting = self.waiting()
        with pytest.raises(ClientFaultError, match=reason) as refusal:
            self.server.receive("client-0", reply if isinstance(reply, bytes) else encode(reply))
        assert refusal.value.client == "client-0"
        assert self.waiting() == waiting
        self.finish_without_client_0()

    def finish_without_client_0(self) -> None:
        requests = self.requests
        while requests:
            requests = self.rehearsal.exchange(requests, self.updates, {"client-0"})
        result = self.server.result
        for segment in ("v", "weight"):
            assert np.array_equal(result.sums[segment], plain_sum(self.updates, segment, result.survivors))


def changed(message: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(message, **fields)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("spoil", ["empty", "cut", "longer", "huge", "text", "other kind"])
def test_malformed_and_oversized_answers_are_refused_in_every_exchange(stage: Stage, spoil: str) -> None:
    fixture = Fixture(stage)
    reply = fixture.rehearsal.answer("client-0", fixture.requests["client-0"], fixture.updates)
    other = Vote(bytes(32), bytes(64)) if stage is not Stage.VOTE else Reveal(bytes(32), b"")
    spoilt = {
        "empty": b"",
        "cut": reply[: len(reply) // 2],
        "longer": reply + b"\x00",
        "huge": bytes(1 << 20),
        "text": b'["Vote", "..."]',
        "other kind": encode(other),
    }[spoil]
    fixture.refuses(spoilt, "expected at most" if spoil == "huge" else KINDS[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_answer_is_refused_in_every_exchange(stage: Stage) -> None:
    fixture = Fixture(stage)
    reply = fixture.rehearsal.answer("client-0", fixture.requests["client-0"], fixture.updates)
    fixture.server.receive("client-0", reply)
    with pytest.raises(ClientFaultError, match="has answered already"):
        fixture.server.receive("client-0", reply)
    for client in fixture.waiting():
        fixture.server.receive(client, fixture.rehearsal.answer(client, fixture.requests[client], fixture.updates))
    requests = fixture.server.advance()
    while requests:
        requests = fixture.rehearsal.exchange(requests, fixture.updates)
    result = fixture.server.result
    assert np.array_equal(result.sums["v"], plain_sum(fixture.updates, "v", result.survivors))


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_that_comes_after_its_exchange_is_refused(stage: Stage) -> None:
    fixture = Fixture(stage)
    late = fixture.rehearsal.answer("client-0", fixture.requests["client-0"], fixture.updates)
    fixture.requests = fixture.rehearsal.exchange(fixture.requests, fixture.updates, {"client-0"})
    with pytest.raises(ClientFaultError, match="nothing is asked of it"):
        fixture.server.receive("client-0", late)
    fixture.finish_without_client_0()


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_of_another_round_is_refused_in_every_exchange(stage: Stage) -> None:
    fixture, other = Fixture(stage), Fixture(stage)
    replayed = other.rehearsal.answer("client-0", other.requests["client-0"], other.updates)
    fixture.refuses(replayed, "belongs to another round")


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_from_somebody_who_was_not_asked_is_refused(stage: Stage) -> None:
    fixture = Fixture(stage)
    reply = fixture.rehearsal.answer("client-0", fixture.requests["client-0"], fixture.updates)
    with pytest.raises(ClientFaultError, match="nothing is asked of it"):
        fixture.server.receive("stranger", reply)
    fixture.finish_without_client_0()


def test_nothing_is_taken_before_the_round_is_opened_or_after_it_ended() -> None:
    rehearsal = Rehearsal.prepare([0] * 5, SEGMENTS)
    with pytest.raises(ClientFaultError, match="nothing is asked of it at new"):
        rehearsal.server.receive("client-0", b"")
    rehearsal.run(random_updates(rehearsal.server.config))
    with pytest.raises(ClientFaultError, match="nothing is asked of it at done"):
        rehearsal.server.receive("client-0", b"")
    for step in (rehearsal.server.open, rehearsal.server.advance):
        with pytest.raises(RoundAbortedError, match="done"):
            step()


def test_there_is_no_sum_before_the_last_exchange() -> None:
    fixture = Fixture(Stage.UNMASK)
    with pytest.raises(RoundAbortedError, match="there is no sum at unmask"):
        _ = fixture.server.result


def test_keys_that_are_not_signed_by_the_pinned_identity_are_refused() -> None:
    fixture = Fixture(Stage.ADVERTISE)
    honest = fixture.honest(Advertisement)
    statement = advertisement_statement(honest.config, 0, honest.share_key, honest.mask_key)
    fixture.refuses(changed(honest, signature=Identity.generate().sign(statement)), "not signed by its pinned identity")


def test_keys_copied_from_another_client_are_refused() -> None:
    fixture = Fixture(Stage.ADVERTISE)
    theirs = fixture.honest(Advertisement, "client-1")
    fixture.server.receive("client-1", encode(theirs))
    fixture.requests.pop("client-1")
    copied = fixture.rehearsal.clients["client-0"].identity.sign(
        advertisement_statement(theirs.config, 0, theirs.mask_key, theirs.share_key)
    )
    fixture.refuses(Advertisement(theirs.config, theirs.mask_key, theirs.share_key, copied), "in use already")


@pytest.mark.parametrize(
    ("share_key", "mask_key", "reason"),
    [
        (bytes(32), Agreement(b"\x05" * 32).public, "weak"),
        (Agreement(b"\x05" * 32).public, bytes(32), "weak"),
        (Agreement(b"\x05" * 32).public, Agreement(b"\x05" * 32).public, "in use already"),
    ],
)
def test_weak_and_repeated_keys_are_refused(share_key: bytes, mask_key: bytes, reason: str) -> None:
    fixture = Fixture(Stage.ADVERTISE)
    config = fixture.honest(Advertisement).config
    identity = fixture.rehearsal.clients["client-0"].identity
    signature = identity.sign(advertisement_statement(config, 0, share_key, mask_key))
    fixture.refuses(Advertisement(config, share_key, mask_key, signature), reason)


@pytest.mark.parametrize(
    "size", [0, ENCRYPTED_SHARE_BYTES * 3, ENCRYPTED_SHARE_BYTES * 4 + 1, ENCRYPTED_SHARE_BYTES * 5]
)
def test_another_number_of_encrypted_shares_than_there_are_holders_is_refused(size: int) -> None:
    fixture = Fixture(Stage.SHARE)
    fixture.refuses(
        changed(fixture.honest(EncryptedShares), encrypted_shares=bytes(size)),
        f"{size} bytes of encrypted shares, expected 80",
    )


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ((), "0 segments, expected 2"),
        ((bytes(26),), "1 segments, expected 2"),
        ((bytes(26), bytes(4), bytes(4)), "3 segments, expected 2"),
        ((bytes(25), bytes(4)), "segment v: 25 bytes, expected 26"),
        ((bytes(26), bytes(5)), "segment weight: 5 bytes, expected 4"),
    ],
)
def test_a_masked_input_of_another_size_is_refused_and_leaves_no_trace(
    segments: tuple[bytes, ...], reason: str
) -> None:
    fixture = Fixture(Stage.MASK)
    fixture.refuses(MaskedInput(fixture.honest(MaskedInput).config, segments), reason)


def test_a_masked_input_whose_second_segment_is_wrong_leaves_no_trace_of_the_first() -> None:
    fixture = Fixture(Stage.MASK)
    honest = fixture.honest(MaskedInput)
    fixture.refuses(changed(honest, segments=(honest.segments[0], b"")), "segment weight: 0 bytes")


def test_a_vote_for_other_survivors_is_refused() -> None:
    fixture = Fixture(Stage.VOTE)
    honest = fixture.honest(Vote)
    transcript = fixture.rehearsal.clients["client-0"].state.transcript  # type: ignore[attr-defined]
    other = fixture.rehearsal.clients["client-0"].identity.sign(transcript.vote_statement(range(5), range(4)))
    fixture.refuses(changed(honest, signature=other), "not for these survivors")


def test_a_vote_signed_by_somebody_else_is_refused() -> None:
    fixture = Fixture(Stage.VOTE, clients=7)
    theirs = fixture.honest(Vote, "client-1")
    fixture.requests.pop("client-1")
    fixture.refuses(theirs, "not signed by its pinned identity")


@pytest.mark.parametrize(
    ("shares", "reason"),
    [
        (b"", "0 bytes of shares, expected 32 for each of 5"),
        (bytes(32 * 4), "128 bytes of shares"),
        (bytes(32 * 6), "192 bytes of shares|expected at most"),
        (b"\xff" * 32 * 5, "not an element of the field"),
    ],
)
def test_shares_of_another_number_or_out_of_the_field_are_refused(shares: bytes, reason: str) -> None:
    fixture = Fixture(Stage.UNMASK)
    fixture.refuses(changed(fixture.honest(Reveal), shares=shares), reason)


def test_wrong_shares_never_spoil_the_sum_and_their_sender_is_named() -> None:
    fixture = Fixture(Stage.UNMASK, clients=7)
    fixture.server.receive("client-0", encode(changed(fixture.honest(Reveal), shares=bytes(32 * 7))))
    for client in fixture.waiting():
        fixture.server.receive(client, encode(fixture.honest(Reveal, client)))
    fixture.server.advance()
    assert fixture.server.result.liars == ("client-0",)
    assert np.array_equal(
        fixture.server.result.sums["v"], plain_sum(fixture.updates, "v", fixture.server.result.survivors)
    )


def test_more_wrong_shares_than_can_be_corrected_abort_the_round_instead_of_giving_a_wrong_sum() -> None:
    fixture = Fixture(Stage.UNMASK, gone=(4,))
    fixture.server.receive("client-0", encode(changed(fixture.honest(Reveal), shares=bytes(32 * 5))))
    for client in fixture.waiting():
        fixture.server.receive(client, encode(fixture.honest(Reveal, client)))
    with pytest.raises(RoundAbortedError, match="the shares of client-0 do not fit together"):
        fixture.server.advance()
    assert fixture.server.stage is Stage.ABORTED


def test_a_wrong_share_of_a_dropout_alone_is_noticed_too() -> None:
    fixture = Fixture(Stage.UNMASK, gone=(4,))
    honest = fixture.honest(Reveal)
    fixture.server.receive("client-0", encode(changed(honest, shares=honest.shares[: 4 * 32] + bytes(32))))
    for client in fixture.waiting():
        fixture.server.receive(client, encode(fixture.honest(Reveal, client)))
    with pytest.raises(RoundAbortedError, match="the shares of client-4 do not fit together"):
        fixture.server.advance()


def test_a_client_that_deals_encrypted_shares_nobody_can_open_is_found_by_its_receivers() -> None:
    fixture = Fixture(Stage.SHARE)
    honest = fixture.honest(EncryptedShares)
    fixture.server.receive("client-0", encode(changed(honest, encrypted_shares=bytes(len(honest.encrypted_shares)))))
    for client in fixture.waiting():
        fixture.server.receive(client, encode(fixture.honest(EncryptedShares, client)))
    requests = fixture.server.advance()
    with pytest.raises(ServerFaultError, match="was altered in transit or has another sender") as refusal:
        fixture.rehearsal.answer("client-1", requests["client-1"], fixture.updates)
    assert refusal.value.suspect == "client-0"


def test_a_commitment_to_another_seed_aborts_the_round_and_names_its_owner() -> None:
    fixture = Fixture(Stage.SHARE)
    fixture.server.receive("client-0", encode(changed(fixture.honest(EncryptedShares), commitment=bytes(32))))
    for client in fixture.waiting():
        fixture.server.receive(client, encode(fixture.honest(EncryptedShares, client)))
    requests = fixture.server.advance()
    while fixture.server.stage is not Stage.UNMASK:
        requests = fixture.rehearsal.exchange(requests, fixture.updates)
    with pytest.raises(RoundAbortedError, match="the shares of client-0 do not fit together"):
        fixture.rehearsal.exchange(requests, fixture.updates)
