"""Two calls of the server's own processes, which carry whole messages; see `fedtune.core.protocol.bundles`.

They use Flower's own handlers and state (flwr 1.41), in one transaction each, so that a message becomes visible
together with its objects. They need the token of a run's task, as Flower's runtime calls do, and the control key, which
the guard requires on the private socket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest, PushAppMessagesResponse
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import SqlLinkState
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.dependencies.task import authenticate_task
from flwr.superlink.servicer.runtime import runtime_handlers
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedtune.core.errors import PeerError
from fedtune.core.protocol.bundles import (
    COLLECT,
    MAX_BATCH_BYTES,
    SEND,
    Collected,
    CollectReplies,
    SendMessages,
    Sent,
)
from fedtune.core.protocol.messages import MAX_PAYLOAD_BYTES, decode, encode
from fedtune.flower.mailboxes import Mailboxes
from fedtune.flower.stored_objects import read_objects, store_objects

RunCall = Callable[[Request, bytes, SqlLinkState], bytes]
"""Answers a call: (request, body, state) -> content."""

M = TypeVar("M")


class RunEndpoints:
    """Answers the two calls.

    Args:
        mailboxes: the messages to devices.
    """

    def __init__(self, mailboxes: Mailboxes) -> None:
        self._mailboxes = mailboxes

    @property
    def calls(self) -> dict[str, RunCall]:
        """The calls by path."""
        return {SEND: self._send, COLLECT: self._collect}

    def _send(self, request: Request, body: bytes, state: SqlLinkState) -> bytes:
        task = _task(request, state)
        sent = decode(body, SendMessages, MAX_PAYLOAD_BYTES)
        messages = _parsed(PushAppMessagesRequest, sent.request)
        pushed = PushAppMessagesResponse()
        if messages.messages_list:
            pushed = runtime_handlers.push_messages(messages, state, task)
            for message, message_id, size in zip(
                messages.messages_list, pushed.message_ids, sent.reply_bytes, strict=True
            ):
                if message_id:
                    self._mailboxes.send(message.metadata.dst_node_id, message_id, size)
            here = [object_id for object_id in pushed.objects_to_push if object_id in sent.objects]
            store_objects(state, task.run_id, pushed.session_id, here, sent.objects)
            left = [object_id for object_id in pushed.objects_to_push if object_id not in sent.objects]
            del pushed.objects_to_push[:]
            pushed.objects_to_push.extend(left)
        self._mailboxes.announce(sent.announced)
        return encode(Sent(pushed.SerializeToString()))

    def _collect(self, request: Request, body: bytes, state: SqlLinkState) -> bytes:
        task = _task(request, state)
        asked = decode(body, CollectReplies, MAX_PAYLOAD_BYTES)
        found = runtime_handlers.pull_messages(PullAppMessagesRequest(message_ids=asked.ids), state, task)
        for message in found.messages_list:
            sender = message.metadata.src_node_id
            if self._mailboxes.collect(sender, message.metadata.reply_to_message_id):
                state.deactivate_node(sender)
        node, whole, objects = Node(node_id=SUPERLINK_NODE_ID), [], dict[str, bytes]()
        for tree in found.message_object_trees:
            left = MAX_BATCH_BYTES - sum(map(len, objects.values()))
            here = read_objects(state, task.run_id, tree, left)
            if here:
                whole.append(tree.object_id)
                objects |= here
                receipt = ConfirmMessageReceivedRequest(node=node, run_id=task.run_id, message_object_id=tree.object_id)
                runtime_handlers.confirm_message_received(receipt, state, task)
        return encode(Collected(found.SerializeToString(), tuple(whole), objects))


def _task(request: Request, state: SqlLinkState) -> Task:
    return authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state)


def _parsed(kind: type[M], data: bytes) -> M:
    message: Any = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise PeerError(f"not a {kind.__name__}") from error
    return message  # type: ignore[no-any-return]
