"""Four endpoints before Flower's, behind the guard, that carry whole messages; see `fedtune.core.protocol.bundles`.

They use Flower's own handlers and state, in one transaction each, so that a message becomes visible together with its
objects. Device requests carry the same signatures as for Flower, which checks them here too. The server's own calls
need the token of a run's task, as Flower's runtime calls do, and the control key, which the guard requires on the
private socket.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest, PushAppMessagesResponse
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import SqlLinkState
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.state.schema.objectstore_models import ObjectChild, StoredObject
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sqlalchemy import delete, select, update

from fedtune.core.errors import PeerError
from fedtune.core.protocol.bundles import (
    BRING,
    COLLECT,
    MAX_BATCH_BYTES,
    MAX_BUNDLE_BYTES,
    MAX_OBJECTS,
    MAX_TAKE_BYTES,
    SEND,
    TAKE,
    BringReply,
    Collected,
    CollectReplies,
    SendMessages,
    Sent,
    TakeMessage,
    Taken,
)
from fedtune.core.protocol.messages import MAX_PAYLOAD_BYTES, decode, encode
from fedtune.flower.guard import MAX_BODY_BYTES, Receive, Scope, Send, answer
from fedtune.flower.reply_bounds import AwaitedReplies, ReplyBound

_NAMES_AT_ONCE = 10_000  # SQLite accepts 32,766 values in a statement
_PUSH_MESSAGES = "/v1/fleet/push-messages"

M = TypeVar("M")


class Bundles:
    """An ASGI application around Flower's; it refuses invalid and oversized replies, also in Flower's own call.

    Args:
        app: Flower's.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._calls: dict[str, Callable[[Request, bytes, SqlLinkState], bytes]] = {
            TAKE: self._take,
            BRING: self._bring,
            SEND: self._send,
            COLLECT: self._collect,
        }
        self._awaited = AwaitedReplies()
        # An upper bound on each node's waiting messages; a node with none is answered without a search.
        self._waiting: Counter[int] = Counter()
        # SQLite has one writer at a time; more threads would wait for it by polling with long sleeps.
        self._worker = ThreadPoolExecutor(1, "bundles")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the four calls, and passes all others on."""
        call = self._calls.get(scope["path"]) if scope["type"] == "http" else None
        if call is None and (scope["type"] != "http" or scope["path"] != _PUSH_MESSAGES):
            await self._app(scope, receive, send)
            return
        body = await _body(receive)
        if body is None:
            return
        status, content = await asyncio.get_running_loop().run_in_executor(
            self._worker, self._answer, call or self._announce, scope, body
        )
        if status != 200:
            await answer(send, status)
            return
        if call is None:
            await self._pass_on(body, scope, receive, send)
            return
        headers = [(b"content-length", str(len(content)).encode()), (b"content-type", b"application/octet-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _pass_on(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        events = iter([{"type": "http.request", "body": body}])

        async def replay() -> MutableMapping[str, Any]:
            return next(events, None) or await receive()

        await self._app(scope, replay, send)

    def _answer(
        self, call: Callable[[Request, bytes, SqlLinkState], bytes], scope: Scope, body: bytes
    ) -> tuple[int, bytes]:
        state = self._app.state.linkstate_factory.state()
        request = Request({**scope, "app": self._app, "state": {}})
        try:
            with state.session():
                try:
                    return 200, call(request, body, state)
                except FlowerError as error:  # keeps the cleanup that Flower did before it refused
                    return API_ERROR_MAP[error.code].http_status_code, b""
        except HTTPException as error:
            return error.status_code, b""
        except (PeerError, ValueError):
            return 400, b""

    def _take(self, request: Request, body: bytes, state: SqlLinkState) -> bytes:
        node = Node(node_id=decode(body, TakeMessage, MAX_TAKE_BYTES).node)
        asked = PullMessagesRequest(node=node)
        _authenticate(request, asked)
        if not self._waiting[node.node_id]:
            del self._waiting[node.node_id]
            return encode(Taken(b"", {}))
        found = fleet_handlers.pull_messages(asked, state, state.object_store)
        self._waiting[node.node_id] -= 1
        objects: dict[str, bytes] = {}
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            run_id = message.metadata.run_id
            objects = _objects(state, run_id, tree, MAX_BUNDLE_BYTES)
            if objects:
                state.store_traffic(run_id, bytes_sent=_size(objects.values()), bytes_recv=0)
                receipt = ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=tree.object_id)
                fleet_handlers.confirm_message_received(receipt, state, state.object_store)
        return encode(Taken(found.SerializeToString(), objects))

    def _announce(self, request: Request, body: bytes, state: SqlLinkState) -> bytes:
        """Checks a reply whose pieces are to come, before Flower stores it."""
        del state
        reply = _parsed(PushMessagesRequest, body)
        _authenticate(request, reply)
        _check_reply(reply)
        self._awaited.admit(reply)
        return b""

    def _bring(self, request: Request, body: bytes, state: SqlLinkState) -> bytes:
        brought = decode(body, BringReply, MAX_BODY_BYTES)
        reply = _parsed(PushMessagesRequest, brought.request)
        _authenticate(request, reply)
        _check_reply(reply)
        self._awaited.admit(reply, _size(brought.objects.values()))
        pushed = fleet_handlers.push_messages(reply, state)
        run_id = reply.messages_list[0].metadata.run_id
        if not set(pushed.objects_to_push) <= brought.objects.keys():
            raise PeerError("the reply is incomplete")
        _store(state, run_id, pushed.session_id, pushed.objects_to_push, brought.objects)
        if brought.objects:
            state.store_traffic(run_id, bytes_sent=0, bytes_recv=_size(brought.objects.values()))
        return b""

    def _send(self, request: Request, body: bytes, state: SqlLinkState) -> bytes:
        task = _task(request, state)
        sent = decode(body, SendMessages, MAX_PAYLOAD_BYTES)
        messages = _parsed(PushAppMessagesRequest, sent.request)
        pushed = PushAppMessagesResponse()
        if messages.messages_list:
            _remove_false_trees(state, messages.message_object_trees)
            pushed = runtime_handlers.push_messages(messages, state, task)
            for message, message_id, size in zip(
                messages.messages_list, pushed.message_ids, sent.reply_bytes, strict=True
            ):
                if message_id:
                    self._awaited.add(message.metadata.dst_node_id, message_id, ReplyBound(size))
            here = [object_id for object_id in pushed.objects_to_push if object_id in sent.objects]
            _store(state, task.run_id, pushed.session_id, here, sent.objects)
            left = [object_id for object_id in pushed.objects_to_push if object_id not in sent.objects]
            del pushed.objects_to_push[:]
            pushed.objects_to_push.extend(left)
        self._waiting.update(sent.announced)
        return encode(Sent(pushed.SerializeToString()))

    def _collect(self, request: Request, body: bytes, state: SqlLinkState) -> bytes:
        task = _task(request, state)
        asked = decode(body, CollectReplies, MAX_PAYLOAD_BYTES)
        found = runtime_handlers.pull_messages(PullAppMessagesRequest(message_ids=asked.ids), state, task)
        node, whole, objects = Node(node_id=SUPERLINK_NODE_ID), [], dict[str, bytes]()
        for tree in found.message_object_trees:
            here = _objects(state, task.run_id, tree, MAX_BATCH_BYTES - _size(objects.values()))
            if here:
                whole.append(tree.object_id)
                objects |= here
                receipt = ConfirmMessageReceivedRequest(node=node, run_id=task.run_id, message_object_id=tree.object_id)
                runtime_handlers.confirm_message_received(receipt, state, task)
        return encode(Collected(found.SerializeToString(), tuple(whole), objects))


def _authenticate(request: Request, asked: PullMessagesRequest | PushMessagesRequest) -> None:
    request.state.protobuf_request = asked
    authenticate_node(request)


def _task(request: Request, state: SqlLinkState) -> Task:
    return authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state)


def _check_reply(request: PushMessagesRequest) -> None:
    """Checks what Flower does not: that there is a single reply, and that its own source is the sender."""
    own = all(message.metadata.src_node_id == request.node.node_id for message in request.messages_list)
    single = len(request.messages_list) == len(request.message_object_trees) == 1
    if not own or not single:
        raise PeerError("expected a single reply whose source is its sender")


def _objects(state: SqlLinkState, run_id: int, tree: ObjectTree, limit: int) -> dict[str, bytes]:
    """Returns all objects of a message; none if one is missing, or if they are too many or too large."""
    objects: dict[str, bytes] = {}
    for part in iterate_object_tree(tree):
        content = state.get_object(run_id, part.object_id)
        limit -= len(content or b"")
        if not content or limit < 0 or len(objects) == MAX_OBJECTS:
            return {}
        objects[part.object_id] = content
    return objects


def _store(
    state: SqlLinkState, run_id: int, session_id: str, object_ids: Iterable[str], objects: Mapping[str, bytes]
) -> None:
    for object_id in object_ids:
        if not state.store_object(run_id, session_id, object_id, objects[object_id]):
            raise PeerError("an object's content does not match its id")  # the transaction drops the whole message


def _remove_false_trees(state: SqlLinkState, trees: Iterable[ObjectTree]) -> None:
    """Removes stored objects whose children differ from those in the given trees.

    A device announces the objects of its reply before it sends them, and may name one that it expects the server to
    send, such as the survivors of a round without dropouts. Flower would then refuse the server's message.
    """
    true = {
        part.object_id: {child.object_id for child in part.children}
        for tree in trees
        for part in iterate_object_tree(tree)
    }
    with state.session() as session:
        for names in _batched(true):
            stored = session.scalars(select(StoredObject.object_id).where(StoredObject.object_id.in_(names)))
            found: dict[str, set[str]] = {str(name): set() for name in stored}
            if not found:
                continue
            links = select(ObjectChild.parent_id, ObjectChild.child_id).where(ObjectChild.parent_id.in_(list(found)))
            for parent, child in session.execute(links):
                found[parent].add(child)
            for name in (name for name, children in found.items() if children != true[name]):
                kept = StoredObject.object_id.in_(found[name])
                session.execute(update(StoredObject).where(kept).values(ref_count=StoredObject.ref_count - 1))
                session.execute(delete(StoredObject).where(StoredObject.object_id == name))


def _batched(names: Iterable[str]) -> Iterator[list[str]]:
    """Yields the names in batches that fit into one statement."""
    rest = iter(names)
    while some := list(islice(rest, _NAMES_AT_ONCE)):
        yield some


def _parsed(kind: type[M], data: bytes) -> M:
    message: Any = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise PeerError(f"not a {kind.__name__}") from error
    return message  # type: ignore[no-any-return]


def _size(contents: Iterable[bytes]) -> int:
    return sum(map(len, contents))


async def _body(receive: Receive) -> bytes | None:
    """Returns the request's body, which the guard has bounded; None where it ends early."""
    chunks, more = [], True
    while more:
        event = await receive()
        if event["type"] != "http.request":
            return None
        chunks.append(event.get("body", b""))
        more = event.get("more_body", False)
    return b"".join(chunks)
