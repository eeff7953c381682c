"""All that a device uses of Flower's internals (flwr 1.41); `tests/live/test_flower_contract.py` holds it to account.

    link = FleetLink(server, authority, node_key)
    link.activate()
    task = link.pull()
    message = link.fetch(task)
    link.answer(reply, task, seconds)

No SuperNode process, no open port, and nothing that executes what a server sends: apps are never asked for.
"""

from __future__ import annotations

import datetime
import email.utils
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    inflate_object_from_contents,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import (
    RuntimeVersionMetadata,
    get_runtime_version_incompatibility_exit_message,
)
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedtune.core.errors import FedtuneError, PeerError
from fedtune.core.protocol.bundles import (
    BRING,
    MAX_BUNDLE_BYTES,
    MAX_OBJECTS,
    MAX_TAKEN_BYTES,
    TAKE,
    BringReply,
    TakeMessage,
    Taken,
)
from fedtune.core.protocol.enrolment import load_node_key
from fedtune.core.protocol.payloads import MAX_PAYLOAD_BYTES, decode
from fedtune.flower.envelope import post

HEARTBEAT_INTERVAL = 15.0  # the server takes a device for gone after two of these
CALL_SECONDS = 20.0
HEARTBEAT_CALL_SECONDS = 12.0
PIECE_SECONDS = 240.0  # a piece, up or down, over a very slow link
MAX_PIECES = 100_000
MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + (16 << 20)  # with a configuration beside the payload
MAX_ANSWER_BYTES = MAX_TAKEN_BYTES + (1 << 20)  # of one call: a piece of a message is far smaller
MAX_CLOCK_ERROR = 2.0
_FETCH_SECONDS = 600.0

T = TypeVar("T")


class UnreachableError(FedtuneError):
    """The server cannot be reached now; it may be reached later."""


class UntrustedError(UnreachableError):
    """What answers is not this fleet's server, or its certificate is not valid now."""


class UnknownDeviceError(FedtuneError):
    """The server does not know this device's key: it was revoked, or the server is just starting."""


class NotAdmittedError(FedtuneError):
    """The server does not take this device in: it was revoked, or still counts as running from before a crash."""


class RunOverError(FedtuneError):
    """The run that a message belongs to is over; its answer is of no use to anyone."""


class IncompatibleError(FedtuneError):
    """The server runs a version of Flower that this one cannot talk to."""


@dataclass(frozen=True)
class Task:
    """A message that waits for this device: who asked what, of which pieces it consists, and those, if it is small."""

    head: Message
    tree: ObjectTree
    proto: bytes
    objects: dict[str, bytes]


class FleetLink:
    """A device's line to its server.

    Args:
        server: HOST:PORT.
        authority: the only certificate authority that is trusted, PEM.
        node_key: private key of the device, PEM.
    """

    def __init__(self, server: str, authority: bytes, node_key: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=authority.decode("ascii"))
        self._signer = _Signer(node_key)
        interceptors: list[ProtobufClientInterceptor] = [_Versions(), self._signer]
        url = f"https://{server}"
        self._calls, self._beats, self._pieces = (
            FleetHttpClient(url, interceptors=interceptors, verify=context, timeout=seconds)
            for seconds in (CALL_SECONDS, HEARTBEAT_CALL_SECONDS, PIECE_SECONDS)
        )
        for client in (self._calls, self._beats, self._pieces):
            client._client.follow_redirects = False  # a server must not send devices about in their own networks
            client._client.event_hooks = {"response": [_bound]}
        self._node = Node()

    @property
    def node_id(self) -> int:
        """What the server calls this device; 0 before `activate`."""
        return self._node.node_id

    @property
    def clock_error(self) -> float:
        """Seconds by which this device's clock is ahead of the server's, as far as it had to be corrected."""
        return self._signer.ahead

    def close(self) -> None:
        """Gives the connections back."""
        for client in (self._calls, self._beats, self._pieces):
            client.close()

    def activate(self) -> int:
        """Tells the server that this device is there.

        Returns:
            The node id.

        Raises:
            UnknownDeviceError, NotAdmittedError, UnreachableError, UntrustedError, IncompatibleError.
        """
        request = ActivateNodeRequest(public_key=self._signer.public, heartbeat_interval=HEARTBEAT_INTERVAL)
        try:
            node_id = self._call(self._calls.ActivateNode, request).node_id
        except UnknownDeviceError:
            if not self._signer.correct_clock():
                raise
            node_id = self._call(self._calls.ActivateNode, request).node_id
        self._node = Node(node_id=node_id)
        return node_id

    def deactivate(self, node_id: int) -> None:
        """Tells the server that the device of this node id has gone; whether it hears it does not matter."""
        with suppress(FedtuneError):
            self._call(self._beats.DeactivateNode, DeactivateNodeRequest(node_id=node_id))

    def beat(self) -> bool:
        """A heartbeat; False where the server no longer counts this device in."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_INTERVAL)
        response = self._call(
            lambda beat: self._beats._unary_unary(
                path="/v1/fleet/send-node-heartbeat",
                rpc_method="/flwr.proto.Fleet/SendNodeHeartbeat",
                request=beat,
                response_type=SendNodeHeartbeatResponse,
                timeout=HEARTBEAT_CALL_SECONDS,  # Flower's own 5 s is too short behind an upload on a slow link
            ),
            request,
        )
        return bool(response.success)

    def pull(self) -> Task | None:
        """A message that waits, or None.

        Raises:
            PeerError: what waits is no message, or larger than any may be.
        """

        def take(asked: TakeMessage) -> tuple[PullMessagesResponse, dict[str, bytes]]:
            taken = decode(post(self._calls, TAKE, asked), Taken, MAX_TAKEN_BYTES)
            return PullMessagesResponse.FromString(taken.found), taken.objects

        try:
            found, objects = self._call(take, TakeMessage(self.node_id))
        except DecodeError as error:
            raise UnreachableError(f"the server's answer cannot be read: {error}") from error
        if not found.messages_list:
            return None
        try:
            proto, tree = found.messages_list[0], found.message_object_trees[0]
            return Task(message_from_proto(proto), tree, proto.SerializeToString(), objects)
        except Exception as error:  # Flower raises what it likes
            raise PeerError(f"not a message: {type(error).__name__}") from error

    def fetch(self, task: Task) -> Message:
        """The message's content.

        Raises:
            PeerError: it is not to be had, or is not what was announced.
        """
        if sum(1 for _ in iterate_object_tree(task.tree)) > MAX_PIECES:
            raise PeerError(f"the message has more than {MAX_PIECES} pieces")
        run_id = task.head.metadata.run_id
        left = MAX_MESSAGE_BYTES

        def pull_piece(piece: PullObjectRequest) -> PullObjectResponse:
            nonlocal left
            pulled: PullObjectResponse = self._call(self._pieces.PullObject, piece)
            left -= len(pulled.object_content)
            if left < 0:
                raise PeerError(f"the message has more than {MAX_MESSAGE_BYTES} bytes")
            return pulled

        pull = make_pull_object_fn_protobuf(pull_piece, self._node, run_id)
        confirm = make_confirm_message_received_fn_protobuf(
            lambda receipt: self._call(self._calls.ConfirmMessageReceived, receipt), self._node, run_id
        )
        try:
            if task.objects:
                message = inflate_object_from_contents(task.tree.object_id, dict(task.objects))
            else:
                message = pull_and_inflate_object_from_tree(
                    task.tree,
                    pull,
                    confirm,
                    initial_backoff=0.02,
                    backoff_cap=0.5,
                    max_tries_per_object=None,
                    max_time=_FETCH_SECONDS,
                )
            if not isinstance(message, Message):
                raise TypeError("it is not a message")
        except FedtuneError:
            raise
        except Exception as error:  # whatever a server sent, this process goes on
            raise PeerError(f"a message could not be fetched: {error}") from error
        message.metadata.__dict__["_message_id"] = task.tree.object_id
        return message

    def answer(self, reply: Message, seconds: float) -> None:
        """Brings a reply to the server; may be called again with the same reply after it failed.

        Raises:
            RunOverError: nobody waits for it any more.
            UnreachableError: try again.
        """
        run_id = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            head = message_to_proto(remove_content_from_message(reply))
            # By the server's clock: what seems to have expired is dropped there, and without a word.
            head.metadata.created_at -= self.clock_error
            head.metadata.ttl += self.clock_error
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[head],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            if objects := _bundle(reply):
                brought = BringReply(request.SerializeToString(), objects)
                self._call(lambda bundle: post(self._pieces, BRING, bundle), brought)
                return
            pushed = self._call(self._calls.PushMessages, request)
            push = make_push_object_fn_protobuf(
                lambda piece: self._call(self._pieces.PushObject, piece), self._node, run_id, pushed.session_id
            )
            try:
                push_objects(
                    get_all_nested_objects(reply),
                    push,
                    object_ids_to_push=set(pushed.objects_to_push),
                    max_concurrent_pushes=1,  # more would only queue up before heartbeats on a slow link
                )
            except ObjectPushError as error:
                raise UnreachableError("the server gave up on an upload that took too long") from error

    def _call(self, call: Callable[[Any], T], request: Any) -> T:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            raise _meaning(error.response) from error
        except httpx.TransportError as error:
            raise _transport(error) from error
        except ValueError as error:
            raise UnreachableError(f"the server's answer cannot be read: {error}") from error


def _bundle(reply: Message) -> dict[str, bytes]:
    """All objects of a reply; none where they are too many or too large to travel at once."""
    objects: dict[str, bytes] = {}
    left = MAX_BUNDLE_BYTES
    for object_id, part in get_all_nested_objects(reply).items():
        objects[object_id] = part.deflate()
        left -= len(objects[object_id])
        if left < 0 or len(objects) > MAX_OBJECTS:
            return {}
    return objects


class _Bounded(httpx.SyncByteStream):
    """An answer's bytes, of which there may be so many."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        left = MAX_ANSWER_BYTES
        for chunk in self._stream:
            left -= len(chunk)
            if left < 0:
                raise PeerError(f"the server's answer has more than {MAX_ANSWER_BYTES} bytes")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _bound(response: httpx.Response) -> None:
    """Keeps an answer from taking more memory than any of this fleet's does; httpx reads whatever comes."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise PeerError("the server's answer is compressed, which nobody asked for")
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _Bounded(response.stream)


def error_reply(request: Message, reason: str) -> Message:
    """What a device answers when it cannot do what it was asked."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason[:500]), reply_to=request)


def interrupted(proto: bytes) -> Message:
    """The message that an earlier process of this device was working on, as far as an error reply needs it.

    Raises:
        PeerError: the bytes are no message.
    """
    message = MessageProto()
    try:
        message.ParseFromString(proto)
        return message_from_proto(message)
    except Exception as error:  # protobuf and Flower raise what they like; the file is only an aid
        raise PeerError(f"not a message: {type(error).__name__}") from error


def identify(message: Message, node_id: int) -> None:
    """Flower makes replies in the name of the process's one task; a device has one at a time."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, message.metadata.run_id, node_id


class _Signer:
    """Signs the time of every request, by the server's clock once that is known to differ."""

    def __init__(self, node_key: str) -> None:
        self._key = load_node_key(node_key)
        self.public = self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.ahead = 0.0
        self._measured = 0.0

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=self.ahead)
        timestamp = now.isoformat()
        context.request.headers.update(
            {
                FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public).decode("ascii"),
                TIMESTAMP_HEADER: timestamp,
                FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(self._key, timestamp.encode("ascii"))).decode(
                    "ascii"
                ),
            }
        )
        response = call_next(context)
        if date := response.headers.get("date"):
            with suppress(ValueError):  # a proxy's own idea of a date
                self._measured = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
        return response

    def correct_clock(self) -> bool:
        """Takes over the server's clock; False where it was the one in use already."""
        if abs(self._measured - self.ahead) <= MAX_CLOCK_ERROR:
            return False
        self.ahead = self._measured
        return True


class _Versions:
    """Says which Flower this is; unlike Flower's own, it does not end the process when the server minds.

    It also asks for answers that are not compressed, see `_bound`.
    """

    def __init__(self) -> None:
        self._metadata = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update({**self._metadata, "accept-encoding": "identity"})
        return call_next(context)


def _meaning(response: httpx.Response) -> FedtuneError:
    text = response.text[:300]
    if complaint := get_runtime_version_incompatibility_exit_message(response.text):
        return IncompatibleError(
            f"the server's version does not fit this device's: {complaint}. Install the same fedtune version on both"
        )
    match response.status_code:
        case 401:
            return UnknownDeviceError(
                "the server does not know this device; if it was revoked, ask for a new bundle, then: "
                "fedtune client leave, and join anew"
            )
        case 403:
            return RunOverError("the run is over")
        case 412:
            return NotAdmittedError(
                "the server does not take this device in: it was revoked (ask for a new bundle), or another process "
                f"uses its keys, or one did until less than {2 * HEARTBEAT_INTERVAL:.0f} s ago (wait)"
            )
        case 404 | 405:
            return UnreachableError("what answers at this address is not a fedtune server")
        case 413:
            return PeerError("the server refuses a message of this size")
    return UnreachableError(f"the server answered {response.status_code}: {text}")


def _transport(error: httpx.TransportError) -> UnreachableError:
    reason = str(error) or type(error).__name__
    if "certificate" in reason.lower():
        detail = reason.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or reason
        if "expired" in detail or "not yet valid" in detail:
            detail += f"; by this device's clock it is {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
        return UntrustedError(f"the server's certificate is refused: {detail}")
    return UnreachableError(f"the server cannot be reached (does it run, and does its address lead to it?): {reason}")
