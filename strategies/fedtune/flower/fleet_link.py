"""A device's link to its server (flwr 1.41); `tests/live/test_flower_contract.py` checks the Flower internals it uses.

    link = FleetLink(server, authority, node_key)
    link.activate()
    task = link.pull()
    request = link.fetch(task)
    link.answer(task, Answer(payload, seconds, made))

There is no SuperNode process, no open port, and no code from the server: the link never requests apps. Messages enter
and leave it as plain values.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
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
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedtune.core.errors import FedtuneError, PeerError
from fedtune.core.host.trusted_server import ServerClock
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
from fedtune.core.protocol.messages import MAX_PAYLOAD_BYTES, Refusal, Request, decode
from fedtune.flower.envelope import SITS_OUT_CODE, identified, post, reply_metadata, request_of, seal
from fedtune.flower.signed_http import (
    HEARTBEAT_CALL_SECONDS,
    HEARTBEAT_INTERVAL,
    MAX_ANSWER_BYTES,
    SignedHttp,
    UnknownDeviceError,
    UnreachableError,
)

MAX_PIECES = 100_000
MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + (16 << 20)  # a payload and a configuration
MAX_REASON = 500  # characters in a refusal
_FETCH_SECONDS = 600.0


@dataclass(frozen=True)
class Task:
    """A message that waits for this device.

    Args:
        note: the part of it that an answer needs, as bytes; see `recalled`.
        head: its Flower metadata.
        tree: its object tree.
        objects: content of its objects, if they are small.
    """

    note: bytes
    head: Metadata
    tree: ObjectTree
    objects: dict[str, bytes]

    @property
    def action(self) -> str:
        """The message type."""
        return self.head.message_type

    @property
    def group(self) -> str:
        """The round that it belongs to, as text."""
        return self.head.group_id

    @property
    def node(self) -> int:
        """The node that it was sent to."""
        return self.head.dst_node_id


@dataclass(frozen=True)
class Answer:
    """A device's answer to a task; equal answers make equal messages, so that an upload can be repeated.

    Args:
        outcome: the payload, or a refusal.
        seconds: duration of the work.
        made: time when it was done, seconds since 1970 by this device's clock.
    """

    outcome: bytes | Refusal
    seconds: float
    made: float


@dataclass(frozen=True)
class LinkLimits:
    """Limits on the bytes that a device accepts: in one response, and in a message in pieces."""

    answer_bytes: int = MAX_ANSWER_BYTES
    message_bytes: int = MAX_MESSAGE_BYTES


LINK_LIMITS = LinkLimits()


class FleetLink:
    """A device's link to its server.

    Args:
        server: HOST:PORT.
        authority: PEM certificate authority, the only trusted one.
        node_key: private key of the device, PEM.
        clock: estimate of the server's clock.
    """

    def __init__(
        self,
        server: str,
        authority: bytes,
        node_key: str,
        clock: ServerClock | None = None,
        limits: LinkLimits = LINK_LIMITS,
    ) -> None:
        self._http = SignedHttp(server, authority, node_key, clock or ServerClock(), limits.answer_bytes)
        self._limits = limits
        self._node = Node()

    @property
    def node_id(self) -> int:
        """The server's number for this device; 0 before `activate`."""
        return self._node.node_id

    @property
    def public_key(self) -> bytes:
        """The public key that identifies requests, PEM."""
        return self._http.public_key

    @property
    def clock_error(self) -> float:
        """Seconds by which this device's clock is ahead of the server's, as far as it was corrected."""
        return self._http.clock.ahead

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def activate(self) -> int:
        """Tells the server that this device is online.

        Returns:
            The node id.

        Raises:
            UnknownDeviceError, NotAdmittedError, UnreachableError, UntrustedError, IncompatibleError.
        """
        request = ActivateNodeRequest(public_key=self._http.public_key, heartbeat_interval=HEARTBEAT_INTERVAL)
        try:
            node_id = self._http.call(self._http.brief.ActivateNode, request).node_id
        except UnknownDeviceError:
            if not self._http.clock.correct():
                raise
            node_id = self._http.call(self._http.brief.ActivateNode, request).node_id
        self._node = Node(node_id=node_id)
        return node_id

    def deactivate(self, node_id: int) -> None:
        """Tells the server that the device of this node id is offline; ignores failures."""
        with suppress(FedtuneError):
            self._http.call(self._http.beats.DeactivateNode, DeactivateNodeRequest(node_id=node_id))

    def beat(self) -> bool:
        """Sends a heartbeat; returns False if the server no longer counts this device as online."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_INTERVAL)
        response = self._http.call(
            lambda beat: self._http.beats._unary_unary(
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
        """Returns a waiting message, or None.

        Raises:
            PeerError: the response is no message, or too large.
        """

        def take(asked: TakeMessage) -> tuple[PullMessagesResponse, dict[str, bytes]]:
            taken = decode(post(self._http.brief, TAKE, asked), Taken, MAX_TAKEN_BYTES)
            return PullMessagesResponse.FromString(taken.found), taken.objects

        try:
            found, objects = self._http.call(take, TakeMessage(self.node_id))
        except DecodeError as error:
            raise UnreachableError(f"the server's answer cannot be read: {error}") from error
        if not found.messages_list:
            return None
        try:
            proto, tree = found.messages_list[0], found.message_object_trees[0]
            return Task(proto.SerializeToString(), message_from_proto(proto).metadata, tree, objects)
        except Exception as error:  # Flower may raise any exception
            raise PeerError(f"not a message: {type(error).__name__}") from error

    def fetch(self, task: Task) -> Request:
        """Downloads the message's content.

        Raises:
            PeerError: the content is unavailable, or differs from the announced one.
        """
        if sum(1 for _ in iterate_object_tree(task.tree)) > MAX_PIECES:
            raise PeerError(f"the message has more than {MAX_PIECES} pieces")
        run_id = task.head.run_id
        left = self._limits.message_bytes

        def pull_piece(piece: PullObjectRequest) -> PullObjectResponse:
            nonlocal left
            pulled: PullObjectResponse = self._http.call(self._http.pieces.PullObject, piece)
            left -= len(pulled.object_content)
            if left < 0:
                raise PeerError(f"the message has more than {self._limits.message_bytes} bytes")
            return pulled

        pull = make_pull_object_fn_protobuf(pull_piece, self._node, run_id)
        confirm = make_confirm_message_received_fn_protobuf(
            lambda receipt: self._http.call(self._http.brief.ConfirmMessageReceived, receipt), self._node, run_id
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
        except Exception as error:  # no message of a server may end this process
            raise PeerError(f"a message could not be fetched: {error}") from error
        return request_of(message)

    def answer(self, task: Task, answer: Answer) -> None:
        """Uploads an answer; may be repeated with the same answer after a failure.

        Raises:
            RunOverError: the server no longer waits for it.
            UnreachableError: try again.
        """
        with no_object_id_recompute():
            reply = _reply(task, answer)
            request = self._announcement(reply, answer.seconds)
            if objects := _objects(reply):
                brought = BringReply(request.SerializeToString(), objects)
                self._http.call(lambda bundle: post(self._http.pieces, BRING, bundle), brought)
            else:
                self._push(reply, request)

    def bundle(self, task: Task, answer: Answer) -> BringReply:
        """Returns the answer as one call carries it, without objects where they are too many or too large for that."""
        reply = _reply(task, answer)
        return BringReply(self._announcement(reply, answer.seconds).SerializeToString(), _objects(reply))

    def _announcement(self, reply: Message, seconds: float) -> PushMessagesRequest:
        head = message_to_proto(remove_content_from_message(reply))
        # By the server's clock, since the server silently drops replies that seem to have expired.
        head.metadata.created_at -= self.clock_error
        head.metadata.ttl += self.clock_error
        return PushMessagesRequest(
            node=self._node,
            messages_list=[head],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[seconds],
        )

    def _push(self, reply: Message, request: PushMessagesRequest) -> None:
        """Uploads a large reply piece by piece."""
        pushed = self._http.call(self._http.brief.PushMessages, request)
        push = make_push_object_fn_protobuf(
            lambda piece: self._http.call(self._http.pieces.PushObject, piece),
            self._node,
            reply.metadata.run_id,
            pushed.session_id,
        )
        try:
            push_objects(
                get_all_nested_objects(reply),
                push,
                object_ids_to_push=set(pushed.objects_to_push),
                max_concurrent_pushes=1,  # more would only delay heartbeats on a slow link
            )
        except ObjectPushError as error:
            raise UnreachableError("the server gave up on an upload that took too long") from error


def recalled(note: bytes) -> Task:
    """Returns the task that an earlier process of this device worked on, as far as a refusal needs it.

    Raises:
        PeerError: the bytes are no message.
    """
    message = MessageProto()
    try:
        message.ParseFromString(note)
        head = message_from_proto(message).metadata
    except Exception as error:  # protobuf and Flower may raise any exception
        raise PeerError(f"not a message: {type(error).__name__}") from error
    return Task(note, head, ObjectTree(object_id=head.message_id), {})


def _reply(task: Task, answer: Answer) -> Message:
    metadata = reply_metadata(task.head, answer.made)
    if isinstance(answer.outcome, bytes):
        reply = make_message(metadata, content=seal(answer.outcome))
    else:
        code = SITS_OUT_CODE if answer.outcome.sits_out else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        reply = make_message(metadata, error=Error(code, answer.outcome.reason[:MAX_REASON]))
    return identified(reply, reply.object_id)


def _objects(reply: Message) -> dict[str, bytes]:
    """Returns all objects of a reply; none if they are too many or too large for one call."""
    objects: dict[str, bytes] = {}
    left = MAX_BUNDLE_BYTES
    for object_id, part in get_all_nested_objects(reply).items():
        objects[object_id] = part.deflate()
        left -= len(objects[object_id])
        if left < 0 or len(objects) > MAX_OBJECTS:
            return {}
    return objects
