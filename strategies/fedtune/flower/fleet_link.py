"""A device's line to its server (flwr 1.41); `tests/live/test_flower_contract.py` holds Flower's internals to account.

    link = FleetLink(server, authority, node_key)
    link.activate()
    task = link.pull()
    request = link.fetch(task)
    link.answer(task, Answer(payload, seconds, made))

No SuperNode process, no open port, and nothing that executes what a server sends: apps are never asked for. Messages
come and go as plain values.
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
MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + (16 << 20)  # with a configuration beside the payload
MAX_REASON = 500  # characters of a refusal
_FETCH_SECONDS = 600.0


@dataclass(frozen=True)
class Task:
    """A message that waits for this device.

    Args:
        note: all that an answer needs to know of it, as bytes; see `recalled`.
        head: who asked what.
        tree: the pieces of which it consists.
        objects: those pieces, if they are small.
    """

    note: bytes
    head: Metadata
    tree: ObjectTree
    objects: dict[str, bytes]

    @property
    def action(self) -> str:
        """Its message type."""
        return self.head.message_type

    @property
    def group(self) -> str:
        """The round it belongs to, as text."""
        return self.head.group_id

    @property
    def node(self) -> int:
        """The node that was asked."""
        return self.head.dst_node_id


@dataclass(frozen=True)
class Answer:
    """A device's answer to a task; the same one makes the same message, however often it is brought.

    Args:
        outcome: the payload, or why there is none.
        seconds: that the work took.
        made: when it was done, seconds since 1970 by this device's clock.
    """

    outcome: bytes | Refusal
    seconds: float
    made: float


@dataclass(frozen=True)
class LinkLimits:
    """How many bytes a device takes: of one call's answer, and of a message in pieces."""

    answer_bytes: int = MAX_ANSWER_BYTES
    message_bytes: int = MAX_MESSAGE_BYTES


LINK_LIMITS = LinkLimits()


class FleetLink:
    """A device's line to its server.

    Args:
        server: HOST:PORT.
        authority: the only certificate authority that is trusted, PEM.
        node_key: private key of the device, PEM.
        clock: the server's, as far as it is known.
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
        """The key that requests show, PEM."""
        return self._http.public_key

    @property
    def clock_error(self) -> float:
        """Seconds by which this device's clock is ahead of the server's, as far as it had to be corrected."""
        return self._http.clock.ahead

    def close(self) -> None:
        """Gives the connections back."""
        self._http.close()

    def activate(self) -> int:
        """Tells the server that this device is there.

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
        """Tells the server that the device of this node id has gone; whether it hears it does not matter."""
        with suppress(FedtuneError):
            self._http.call(self._http.beats.DeactivateNode, DeactivateNodeRequest(node_id=node_id))

    def beat(self) -> bool:
        """A heartbeat; False where the server no longer counts this device in."""
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
        """A message that waits, or None.

        Raises:
            PeerError: what waits is no message, or larger than any may be.
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
        except Exception as error:  # Flower raises what it likes
            raise PeerError(f"not a message: {type(error).__name__}") from error

    def fetch(self, task: Task) -> Request:
        """Brings the message's content here.

        Raises:
            PeerError: it is not to be had, or is not what was announced.
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
        except Exception as error:  # whatever a server sent, this process goes on
            raise PeerError(f"a message could not be fetched: {error}") from error
        return request_of(message)

    def answer(self, task: Task, answer: Answer) -> None:
        """Brings an answer to the server; may be called again with the same one after it failed.

        Raises:
            RunOverError: nobody waits for it any more.
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
        """The answer as one call carries it, without objects where they are too many or too large for that."""
        reply = _reply(task, answer)
        return BringReply(self._announcement(reply, answer.seconds).SerializeToString(), _objects(reply))

    def _announcement(self, reply: Message, seconds: float) -> PushMessagesRequest:
        head = message_to_proto(remove_content_from_message(reply))
        # By the server's clock: what seems to have expired is dropped there, and without a word.
        head.metadata.created_at -= self.clock_error
        head.metadata.ttl += self.clock_error
        return PushMessagesRequest(
            node=self._node,
            messages_list=[head],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[seconds],
        )

    def _push(self, reply: Message, request: PushMessagesRequest) -> None:
        """Brings a large reply, piece by piece."""
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
                max_concurrent_pushes=1,  # more would only queue up before heartbeats on a slow link
            )
        except ObjectPushError as error:
            raise UnreachableError("the server gave up on an upload that took too long") from error


def recalled(note: bytes) -> Task:
    """The task that an earlier process of this device was working on, as far as a refusal needs it.

    Raises:
        PeerError: the bytes are no message.
    """
    message = MessageProto()
    try:
        message.ParseFromString(note)
        head = message_from_proto(message).metadata
    except Exception as error:  # protobuf and Flower raise what they like; the file is only an aid
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
    """All objects of a reply; none where they are too many or too large to travel at once."""
    objects: dict[str, bytes] = {}
    left = MAX_BUNDLE_BYTES
    for object_id, part in get_all_nested_objects(reply).items():
        objects[object_id] = part.deflate()
        left -= len(objects[object_id])
        if left < 0 or len(objects) > MAX_OBJECTS:
            return {}
    return objects
