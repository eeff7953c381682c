"""The server's side of the calls of devices (`fedtune.core.protocol.device_calls`), on Flower's state (flwr 1.41).

Devices speak plain payloads, and know nothing of Flower. Here a message of a Flower grid becomes an `Assignment`, and a
device's answer a Flower message, stored in one transaction with its objects. The guard has checked who calls.
"""

from __future__ import annotations

import hashlib
import time
from base64 import b64decode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from fastapi import HTTPException
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode, Status
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import SqlLinkState
from flwr.server.superlink.utils import check_abort
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.servicer.fleet import fleet_handlers
from msgspec import structs

from fedtune.core.errors import PeerError
from fedtune.core.protocol.device_calls import (
    ANNOUNCE,
    APPEND,
    BEAT,
    BRING,
    CONNECT,
    HEARTBEAT_SECONDS,
    LEAVE,
    MAX_CALL_BYTES,
    MAX_PIECE_BYTES,
    READ_PART,
    TAKE,
    AnnounceAnswer,
    AppendPiece,
    Assignment,
    BringAnswer,
    ReadPart,
    Received,
    Refused,
    Taken,
)
from fedtune.core.protocol.messages import Payload, decode, encode
from fedtune.core.protocol.signed_requests import KEY_HEADER
from fedtune.flower.envelope import SITS_OUT_CODE, identified, reply_metadata, request_of, seal
from fedtune.flower.mailboxes import OVER, ArrivingAnswer, Letter, Mailboxes, StoredParts
from fedtune.flower.stored_objects import store_objects

_UNKNOWN, _NOT_ADMITTED = 401, 412

DeviceCall = Callable[[Mapping[bytes, bytes], bytes, SqlLinkState], bytes]
"""Answers a call: (headers, body, state) -> content."""

P = TypeVar("P", bound=Payload)


class DeviceEndpoints:
    """Answers the calls of devices.

    Args:
        mailboxes: the messages to them.
        folder: folder for the unnamed files of large messages and answers.
    """

    def __init__(self, mailboxes: Mailboxes, folder: Path) -> None:
        self._mailboxes, self._folder = mailboxes, folder
        self._shared: WeakValueDictionary[str, StoredParts] = WeakValueDictionary()

    @property
    def calls(self) -> dict[str, DeviceCall]:
        """The calls by path."""
        by_node: dict[str, Callable[[int, bytes, SqlLinkState], bytes]] = {
            BEAT: self._beat,
            LEAVE: self._leave,
            TAKE: self._take,
            READ_PART: self._read,
            BRING: self._bring,
            ANNOUNCE: self._announce,
            APPEND: self._append,
        }

        def known(call: Callable[[int, bytes, SqlLinkState], bytes]) -> DeviceCall:
            return lambda headers, body, state: call(_node(headers, state), body, state)

        return {CONNECT: self._connect, **{path: known(call) for path, call in by_node.items()}}

    def _connect(self, headers: Mapping[bytes, bytes], body: bytes, state: SqlLinkState) -> bytes:
        _check_empty(body)
        request = ActivateNodeRequest(public_key=_key(headers), heartbeat_interval=HEARTBEAT_SECONDS)
        node = _node(headers, state)
        if self._mailboxes.come_back(node):
            state.deactivate_node(node)  # Flower takes no node in that is online already
        fleet_handlers.activate_node(request, state)
        return b""

    def _beat(self, node: int, body: bytes, state: SqlLinkState) -> bytes:
        _check_empty(body)
        request = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=HEARTBEAT_SECONDS)
        if not fleet_handlers.send_node_heartbeat(request, state).success:
            raise HTTPException(_NOT_ADMITTED)
        return b""

    def _leave(self, node: int, body: bytes, state: SqlLinkState) -> bytes:
        _check_empty(body)
        if self._mailboxes.leave(node):
            state.deactivate_node(node)
        return b""

    def _take(self, node: int, body: bytes, state: SqlLinkState) -> bytes:
        _check_empty(body)
        if not self._mailboxes.take(node):
            return encode(Taken(None))
        found = fleet_handlers.pull_messages(PullMessagesRequest(node=Node(node_id=node)), state, state.object_store)
        if not found.messages_list:  # it has expired, or its run is over
            return encode(Taken(None))
        asked, tree = message_from_proto(found.messages_list[0]).metadata, found.message_object_trees[0]
        letter = self._mailboxes.letter(node, asked.message_id)
        letter.asked = asked
        parts = self._parts(asked, tree, letter, state)
        sizes = letter.parts.sizes if letter.parts else ()
        assignment = Assignment(asked.message_id, asked.message_type, asked.group_id, parts, sizes)
        receipt = ConfirmMessageReceivedRequest(
            node=Node(node_id=node), run_id=asked.run_id, message_object_id=tree.object_id
        )
        fleet_handlers.confirm_message_received(receipt, state, state.object_store)
        return encode(Taken(assignment))

    def _parts(self, asked: Metadata, tree: ObjectTree, letter: Letter, state: SqlLinkState) -> tuple[bytes, ...]:
        """Returns the payloads of a message, or puts them into the letter if they are too large for one call."""
        content = tree.children[0].object_id  # the same in all messages of the same content
        if shared := self._shared.get(content):
            letter.parts = shared
            return ()
        objects = {
            part.object_id: state.get_object(asked.run_id, part.object_id) or b"" for part in iterate_object_tree(tree)
        }
        message = inflate_object_from_contents(tree.object_id, objects)
        assert isinstance(message, Message)
        parts = request_of(message).parts
        if sum(map(len, parts)) <= MAX_PIECE_BYTES:
            return parts
        letter.parts = self._shared[content] = StoredParts(parts, self._folder)
        return ()

    def _read(self, node: int, body: bytes, state: SqlLinkState) -> bytes:
        wanted = _decoded(body, ReadPart)
        letter = self._mailboxes.letter(node, wanted.message)
        if letter.parts is None:
            raise HTTPException(OVER)
        _check_running(letter, state)
        return letter.parts.read(wanted.part, wanted.offset)

    def _bring(self, node: int, body: bytes, state: SqlLinkState) -> bytes:
        brought = _decoded(body, BringAnswer)
        letter = self._mailboxes.letter(node, brought.message)
        digest = hashlib.sha256(encode(structs.replace(brought, seconds=0.0))).digest()
        if letter.admit(len(brought.payload), digest):
            _check_running(letter, state)
            outcome = brought.payload if brought.refused is None else brought.refused
            _store(letter, outcome, brought.seconds, state)
            letter.close(digest)
        return b""

    def _announce(self, node: int, body: bytes, state: SqlLinkState) -> bytes:
        announced = _decoded(body, AnnounceAnswer)
        letter = self._mailboxes.letter(node, announced.message)
        if not letter.admit(announced.size, announced.digest):
            return encode(Received(announced.size))
        _check_running(letter, state)
        arriving = letter.arriving
        if arriving is None or (arriving.size, arriving.digest) != (announced.size, announced.digest):
            arriving = ArrivingAnswer(announced.size, announced.digest, announced.seconds, self._folder)
            letter.arriving = arriving
        return encode(Received(arriving.received))

    def _append(self, node: int, body: bytes, state: SqlLinkState) -> bytes:
        piece = _decoded(body, AppendPiece)
        letter = self._mailboxes.letter(node, piece.message)
        if letter.answered:  # the answer to the last piece was lost on its way
            return encode(Received(piece.offset + len(piece.content)))
        if letter.arriving is None:
            raise HTTPException(OVER)
        _check_running(letter, state)
        arriving = letter.arriving
        arriving.append(piece.offset, piece.content)
        if (whole := _whole(letter, arriving)) is not None:
            _store(letter, whole, arriving.seconds, state)
            letter.close(arriving.digest)
        return encode(Received(arriving.received))


def _whole(letter: Letter, arriving: ArrivingAnswer) -> bytes | None:
    try:
        return arriving.whole()
    except PeerError:
        letter.arriving = None
        raise


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    """Returns the public key that the guard has checked the request with, PEM."""
    return b64decode(headers[KEY_HEADER.encode()])


def _node(headers: Mapping[bytes, bytes], state: SqlLinkState) -> int:
    node = state.get_node_id_by_public_key(_key(headers))
    if node is None:
        raise HTTPException(_UNKNOWN)
    return node


def _check_empty(body: bytes) -> None:
    if body:
        raise PeerError(f"a call with {len(body)} bytes; expected none")


def _decoded(body: bytes, kind: type[P]) -> P:
    return decode(body, kind, MAX_CALL_BYTES)


def _check_running(letter: Letter, state: SqlLinkState) -> None:
    """Checks that the message was taken, and that somebody waits for its answer.

    Raises:
        HTTPException: it was not, or nobody does.
    """
    asked = letter.asked
    if asked is None or asked.created_at + asked.ttl <= time.time():
        raise HTTPException(OVER)
    if check_abort(asked.run_id, [Status.PENDING, Status.STARTING, Status.FINISHED], state):
        raise HTTPException(OVER)


def _store(letter: Letter, outcome: bytes | Refused, seconds: float, state: SqlLinkState) -> None:
    """Stores an answer as the Flower message that the grid waits for."""
    assert letter.asked is not None
    metadata = reply_metadata(letter.asked, time.time())
    with no_object_id_recompute():
        reply = _reply(metadata, outcome)
        node = Node(node_id=metadata.src_node_id)
        head = message_to_proto(remove_content_from_message(reply))
        request = PushMessagesRequest(
            node=node,
            messages_list=[head],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[seconds],
        )
        pushed = fleet_handlers.push_messages(request, state)
        objects = {object_id: part.deflate() for object_id, part in get_all_nested_objects(reply).items()}
    store_objects(state, metadata.run_id, pushed.session_id, pushed.objects_to_push, objects)


def _reply(metadata: Metadata, outcome: bytes | Refused) -> Message:
    if isinstance(outcome, bytes):
        content: RecordDict = seal(outcome)
        reply = make_message(metadata, content=content)
    else:
        code = SITS_OUT_CODE if outcome.sits_out else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        reply = make_message(metadata, error=Error(code, outcome.reason))
    return identified(reply, reply.object_id)
