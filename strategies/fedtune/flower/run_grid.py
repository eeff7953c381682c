"""A Flower grid over the SuperLink's runtime API; `tests/live/test_flower_contract.py` checks the internals it uses.

with link.open_run(longest_answer) as grid:
    grid.push_messages(messages)
    replies = grid.pull_messages(message_ids)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, push_objects
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedtune.core.errors import PeerError, RunError
from fedtune.core.protocol.bundles import COLLECT, MAX_BATCH_BYTES, SEND, Collected, CollectReplies, SendMessages, Sent
from fedtune.core.protocol.messages import HEADER_BYTES, Payload, decode
from fedtune.core.text import one_line
from fedtune.flower.envelope import SITS_OUT_CODE, Parcel, identified, parcels, post, reply_metadata, seal, unseal

HEARTBEAT_SECONDS = 15.0
SHORTEST_PATIENCE = 120.0
PATIENCE = 5.0  # the others may take this many times as long as the faster half
_POLL_SECONDS = 0.05

T = TypeVar("T")
P = TypeVar("P", bound=Payload)


class LinkLostError(RunError):
    """The SuperLink does not answer, or no longer knows the run; the job resumes in a new run after its last round."""


def called(call: Callable[[Any], T], request: Any, alive: Callable[[], bool]) -> T:
    """Returns the answer to a request.

    Args:
        alive: whether the listening process still runs; without this check a call would wait until its timeout, since
            this process keeps the sockets open.

    Raises:
        LinkLostError: the call failed.
    """
    if not alive():
        raise LinkLostError("the listening process has ended")
    try:
        return call(request)
    except httpx.HTTPStatusError as error:
        text = error.response.text[:200]
        raise LinkLostError(f"the SuperLink answered {error.response.status_code}: {text}") from error
    except (httpx.HTTPError, OSError, ValueError, PeerError) as error:
        raise LinkLostError(f"the SuperLink does not answer: {error or type(error).__name__}") from error


@dataclass
class _Sent:
    """A message that waits for its reply, and its batch."""

    head: Message
    batch: _Batch


@dataclass
class _Batch:
    """Messages that were sent together, and the time that they may take.

    Until half of them are answered, each may take `longest`; from then on PATIENCE times as long as that half took,
    because a device whose message was lost on the way never answers.
    """

    size: int
    longest: float
    sent: float = field(default_factory=lambda: time.monotonic())
    answered: int = 0
    half: float | None = None

    def answer(self) -> None:
        self.answered += 1
        if self.half is None and 2 * self.answered >= self.size:
            self.half = time.monotonic() - self.sent

    def over(self) -> bool:
        if self.size == 1 or self.half is None:
            limit = self.longest
        else:
            limit = min(self.longest, max(SHORTEST_PATIENCE, PATIENCE * self.half))
        return time.monotonic() - self.sent > limit


@dataclass
class _Arriving:
    """A reply that has been announced, some of whose pieces may still be missing."""

    proto: MessageProto
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    confirmed: bool = False

    @classmethod
    def of(cls, proto: MessageProto, object_ids: list[str], collected: Collected) -> _Arriving:
        if proto.metadata.message_id not in collected.whole:
            return cls(proto, object_ids)
        contents = {object_id: collected.objects[object_id] for object_id in object_ids}
        return cls(proto, [], contents, confirmed=True)


class RunGrid(Grid):
    """A Flower grid over the SuperLink's runtime API; it never blocks, and a slow upload delays no other.

    As a context manager it keeps the run's task alive, and ends it.

    Args:
        client: client with the run's token.
        longest_answer: seconds that a device may take where no measurement says less.
        alive: as in `called`.
        batch_bytes: limit on the bytes of objects in one call to the SuperLink.
    """

    def __init__(
        self,
        client: RuntimeHttpClient,
        longest_answer: float,
        alive: Callable[[], bool],
        batch_bytes: int = MAX_BATCH_BYTES,
    ) -> None:
        self._client = client
        self._batch_bytes = batch_bytes
        self._bounds: dict[str, int] = {}
        self._alive = alive
        self._longest = longest_answer
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._sent: dict[str, _Sent] = {}
        self._arriving: dict[str, _Arriving] = {}
        self._sitting_out: set[int] = set()
        self._lost = threading.Event()
        self._done = threading.Event()
        task = called(client.PullTaskInput, PullTaskInputRequest(), alive)
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        self._run: Run = run_from_proto(task.run)
        self._beat = threading.Thread(target=self._keep_alive, daemon=True, name="task-heartbeat")

    def __enter__(self) -> RunGrid:
        self._beat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._done.set()
        self._beat.join(timeout=1.0)
        status = SubStatus.COMPLETED if kind is None else SubStatus.FAILED
        details = "" if kind is None else kind.__name__
        try:
            output = PushTaskOutputRequest(sub_status=status, details=details)
            called(self._client.PushTaskOutput, output, self._alive)
        except LinkLostError:
            pass  # the SuperLink has ended it already
        finally:
            self._client.close()

    def set_run(self, run: Run) -> None:
        """Replaces the run; a grid is created with one."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        """Refuses Flower's deprecated way to make a message."""
        raise NotImplementedError("make a flwr.app.Message instead")

    def get_node_ids(self) -> list[int]:
        """Returns the devices that are online."""
        return [node.node_id for node in self._call(self._client.GetNodes, GetNodesRequest()).nodes]

    def bound_replies(self, message_type: str, payload_bytes: int) -> None:
        """Says how long a payload can be that answers a message of this type, of those sent from now on.

        Without that, it has no vector. The listening process takes no longer ones.
        """
        self._bounds[message_type] = payload_bytes

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        """Sends messages; returns the ids of those that were sent, "" for the others."""
        messages = list(messages)
        batch = _Batch(len(messages), self._longest)
        with no_object_id_recompute():
            pushed = [
                message_id
                for parcel in parcels(messages, self._batch_bytes)
                for message_id in self._push(parcel, batch)
            ]
        batch.sent = time.monotonic()
        return pushed

    def _push(self, parcel: Parcel, batch: _Batch) -> Sequence[str]:
        request = PushAppMessagesRequest(
            messages_list=[message_to_proto(head) for head in parcel.heads], message_object_trees=parcel.trees
        )
        nodes = tuple(head.metadata.dst_node_id for head in parcel.heads)
        sizes = tuple(self._bounds.get(head.metadata.message_type, HEADER_BYTES) for head in parcel.heads)
        announced = () if parcel.rest else nodes
        pushed = self._send(SendMessages(request.SerializeToString(), parcel.contents, announced, sizes))
        if parcel.rest:
            push = make_push_object_fn_protobuf(
                lambda piece: self._call(self._client.PushObject, piece),
                self._node,
                self._run.run_id,
                pushed.session_id,
            )
            push_objects(parcel.rest, push, object_ids_to_push=set(pushed.objects_to_push))
            self._send(SendMessages(b"", {}, nodes, ()))
        for message_id, head in zip(pushed.message_ids, parcel.heads, strict=True):
            if message_id:
                self._sent[message_id] = _Sent(head, batch)
        return list(pushed.message_ids)

    def _send(self, sent: SendMessages) -> PushAppMessagesResponse:
        pushed = PushAppMessagesResponse()
        pushed.ParseFromString(self._bundle(SEND, sent, Sent).pushed)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the complete replies to these messages; a reply that can no longer arrive carries an error."""
        asked = [message_id for message_id in message_ids if message_id in self._sent]
        unknown = [message_id for message_id in asked if message_id not in self._arriving]
        if unknown:
            collected = self._bundle(COLLECT, CollectReplies(tuple(unknown)), Collected)
            found = PullAppMessagesResponse.FromString(collected.found)
            for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                asked_by = proto.metadata.reply_to_message_id
                if asked_by in self._sent:
                    self._arriving[asked_by] = _Arriving.of(proto, _object_ids(tree), collected)
        replies = []
        for message_id in asked:
            sent = self._sent[message_id]
            reply = self._take(message_id, sent)
            if reply is None and sent.batch.over():
                reply = _failed(sent.head, "no answer, though the device is online")
            if reply is not None:
                sent.batch.answer()
                del self._sent[message_id]
                self._arriving.pop(message_id, None)
                replies.append(reply)
        return replies

    def drop_late(self) -> set[int]:
        """Discards late answers; returns the nodes that have still not answered."""
        self.pull_messages(list(self._sent))
        return {sent.head.metadata.dst_node_id for sent in self._sent.values()}

    def sitting_out(self) -> set[int]:
        """Returns the nodes that refused a message because they sit out, since the last call."""
        found, self._sitting_out = self._sitting_out, set()
        return found

    def ask(
        self, nodes: Iterable[int], action: str, group: str, payload: bytes, seconds: float
    ) -> dict[int, bytes | PeerError]:
        """Sends a payload to all nodes; returns the answers that arrive in time: node -> payload, or its error."""
        content = seal(payload)
        messages = [Message(content, node, action, group_id=group) for node in nodes]
        answers: dict[int, bytes | PeerError] = {}
        for reply in self.send_and_receive(messages, timeout=seconds):
            try:
                answers[reply.metadata.src_node_id] = unseal(reply)
            except PeerError as error:
                answers[reply.metadata.src_node_id] = error
        return answers

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Sends the messages, and waits for all replies or until the timeout."""
        end = None if timeout is None else time.monotonic() + timeout
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        replies: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            arrived = self.pull_messages(waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
            if not arrived:
                time.sleep(_POLL_SECONDS)
        return replies

    def _take(self, message_id: str, sent: _Sent) -> Message | None:
        arriving = self._arriving.get(message_id)
        if arriving is None:
            return None
        while arriving.missing:
            piece = self._call(
                self._client.PullObject,
                PullObjectRequest(node=self._node, run_id=self._run.run_id, object_id=arriving.missing[-1]),
            )
            if not piece.object_found:
                return _failed(sent.head, "the device stopped in the middle of its upload")
            if not piece.object_available:
                return None
            arriving.contents[arriving.missing.pop()] = piece.object_content
        object_id = arriving.proto.metadata.message_id
        if not arriving.confirmed:
            receipt = ConfirmMessageReceivedRequest(
                node=self._node, run_id=self._run.run_id, message_object_id=object_id
            )
            self._call(self._client.ConfirmMessageReceived, receipt)
        try:
            reply = inflate_object_from_contents(object_id, arriving.contents)
        except Exception as error:  # no reply of a device may end this process
            return _failed(sent.head, f"the reply cannot be read: {type(error).__name__}")
        if not isinstance(reply, Message):
            return _failed(sent.head, "the reply is not a message")
        if reply.has_error():
            if reply.error.code == SITS_OUT_CODE:
                self._sitting_out.add(sent.head.metadata.dst_node_id)
            return _failed(sent.head, reply.error.reason or "unknown reason", reply.error.code)
        if (
            reply.metadata.src_node_id != sent.head.metadata.dst_node_id
            or reply.metadata.reply_to_message_id != message_id
        ):
            return _failed(sent.head, "the reply is from another device")
        return identified(reply, object_id)

    def _keep_alive(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            try:
                if not called(self._client.SendTaskHeartbeat, SendTaskHeartbeatRequest(), self._alive).success:
                    self._lost.set()
            except LinkLostError:
                self._lost.set()

    def _call(self, call: Callable[[Any], T], request: Any) -> T:
        if self._lost.is_set():
            raise LinkLostError("the SuperLink no longer knows the run")
        return called(call, request, self._alive)

    def _bundle(self, path: str, payload: Payload, kind: type[P]) -> P:
        def call(payload: Payload) -> P:
            return decode(post(self._client, path, payload), kind)

        return self._call(call, payload)


def _object_ids(tree: ObjectTree) -> list[str]:
    return [part.object_id for part in iterate_object_tree(tree)]


def _failed(head: Message, reason: str, code: int = ErrorCode.MESSAGE_UNAVAILABLE) -> Message:
    """Returns an error in the form in which the asked device would send it."""
    return make_message(metadata=reply_metadata(head.metadata, time.time()), error=Error(code, one_line(reason[:500])))
