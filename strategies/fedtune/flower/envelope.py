"""The translation of Flower messages (flwr 1.41): payloads, plain requests, and the byte form of whole messages.

A payload is one Array of uint8 in one RecordDict, because many small arrays are slow.
Measured on flwr 1.41 over HTTP: 448 arrays of 32 KB took 29 s, the same bytes in one array 6.4 s. A message has one
part, or two where one of them is the same for many clients: Flower stores equal arrays once. Short parts use a
ConfigRecord instead: an Array travels as three objects with a request each, both ways, a ConfigRecord as one.

The byte form is the one that a client receives over a network, made by Flower's own serialisation. It ensures that
every message can be serialised, and that a simulated server and its clients share no objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufRequestContext

from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import Handler, Payload, Request, encode, parts_of

MAX_PARTS = 2
MAX_SHORT_BYTES = 4096  # for all parts together

SITS_OUT_CODE = 1000
"""Error code of a device that sits a round out; all codes below it are Flower's own."""

_RECORD = "fedtune"
_PARTS = tuple(f"part-{index}" for index in range(MAX_PARTS))


def seal(*parts: bytes) -> RecordDict:
    """Returns the content of a Flower message that carries the parts."""
    if sum(map(len, parts)) <= MAX_SHORT_BYTES:
        return RecordDict({_RECORD: ConfigRecord(dict(zip(_PARTS, parts, strict=False)))})
    arrays = {name: Array(np.frombuffer(part, dtype=np.uint8)) for name, part in zip(_PARTS, parts, strict=False)}
    return RecordDict({_RECORD: ArrayRecord(arrays)})


def unseal(message: Message) -> bytes:
    """Returns the only part that a Flower message carries.

    Raises:
        PeerError: as in `unseal_parts`, or the message carries more than one part.
    """
    (payload,) = unseal_parts(message, 1)
    return payload


def unseal_parts(message: Message, count: int) -> tuple[bytes, ...]:
    """Returns the parts that a Flower message carries.

    Raises:
        PeerError: the message carries an error, or its content is not `count` flat arrays of uint8.
    """
    if message.has_error():
        raise PeerError(f"no answer: {message.error.reason or 'unknown reason'} (code {message.error.code})")
    content = message.content
    record = content.get(_RECORD)
    if len(content) != 1 or not isinstance(record, ArrayRecord | ConfigRecord) or tuple(record) != _PARTS[:count]:
        raise PeerError(f"a message with the records {list(content)}; expected one named {_RECORD} of {count} parts")
    return tuple(map(_bytes, record.values()))


def request_of(message: Message) -> Request:
    """Returns the plain values of a message to a client.

    Raises:
        PeerError: as in `unseal_parts`.
    """
    asked = message.metadata
    parts = unseal_parts(message, parts_of(asked.message_type))
    return Request(asked.message_type, asked.group_id, parts)


@dataclass(frozen=True)
class WireMessage:
    """A serialised message: Flower's content-addressed objects, the root's address, and the message id."""

    message_id: str
    object_id: str
    objects: dict[str, bytes]


def to_wire(message: Message) -> WireMessage:
    """Serialises a message."""
    objects = {object_id: part.deflate() for object_id, part in get_all_nested_objects(message).items()}
    return WireMessage(message.metadata.message_id, message.object_id, objects)


def from_wire(wire: WireMessage) -> Message:
    """Rebuilds a message."""
    message = inflate_object_from_contents(wire.object_id, dict(wire.objects))
    assert isinstance(message, Message)
    return identified(message, wire.message_id)


def answer_wire(wire: WireMessage, client: str, handler: Handler) -> WireMessage:
    """Answers a message by a client's handler, bytes in and bytes out; the handler's errors pass through."""
    message = from_wire(wire)
    return to_wire(Message(seal(handler(client, request_of(message))), reply_to=message))


def identified(message: Message, message_id: str) -> Message:
    """Returns the message with the id that a SuperLink would give it, to which replies refer; shares the content."""
    told = message.metadata
    metadata = Metadata(
        run_id=told.run_id,
        message_id=message_id,
        src_node_id=told.src_node_id,
        dst_node_id=told.dst_node_id,
        reply_to_message_id=told.reply_to_message_id,
        group_id=told.group_id,
        created_at=told.created_at,
        ttl=told.ttl,
        message_type=told.message_type,
        src_task_id=told.src_task_id,
        dst_task_id=told.dst_task_id,
    )
    if message.has_error():
        return make_message(metadata=metadata, error=message.error)
    return make_message(metadata=metadata, content=message.content)


def reply_metadata(asked: Metadata, created_at: float) -> Metadata:
    """Returns the metadata of a reply, which expires when the message does.

    Args:
        created_at: seconds since 1970.
    """
    return Metadata(
        run_id=asked.run_id,
        message_id="",
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=created_at,
        ttl=asked.created_at + asked.ttl - created_at,
        message_type=asked.message_type,
        src_task_id=asked.dst_task_id,
        dst_task_id=asked.src_task_id,
    )


@dataclass
class Parcel:
    """Messages that are pushed together, with their objects: as content while they fit, otherwise as objects."""

    heads: list[Message] = field(default_factory=list)
    trees: list[ObjectTree] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    size: int = 0


def parcels(messages: Iterable[Message], limit: int) -> Iterator[Parcel]:
    """Splits messages into parcels, each of about `limit` bytes; equal objects of one parcel are in it once."""
    parcel = Parcel()
    for message in messages:
        if parcel.size > limit:
            yield parcel
            parcel = Parcel()
        parcel.heads.append(identified(remove_content_from_message(message), message.object_id))
        parcel.trees.append(get_object_tree(message))
        for object_id, part in get_all_nested_objects(message).items():
            if object_id in parcel.contents or object_id in parcel.rest:
                continue
            content = part.deflate()
            parcel.size += len(content)
            if parcel.size > limit:
                parcel.rest[object_id] = part
            else:
                parcel.contents[object_id] = content
    if parcel.heads:
        yield parcel


def post(client: ProtobufClient, path: str, payload: Payload) -> bytes:
    """Returns the answer to a call with a bare payload, sent over Flower's client with its connections and headers.

    Raises:
        httpx.HTTPError: the call failed.
    """
    request = client._client.build_request("POST", f"{client._base_url}{path}", content=encode(payload))
    response = client._send(ProtobufRequestContext(path, Node(), request))
    response.raise_for_status()
    return response.content


def _bytes(array: object) -> bytes:
    if isinstance(array, bytes):
        return array
    if not isinstance(array, Array):
        raise PeerError(f"the payload is {type(array).__name__}; expected bytes or an array")
    try:
        values = array.numpy()
    except Exception as error:  # numpy trusts the header: a sender can cause MemoryError, tokenize's errors and more
        raise PeerError(f"the payload is not a readable array: {error}") from error
    if not isinstance(values, np.ndarray):  # an archive of several arrays
        raise PeerError(f"the payload is {type(values).__name__}; expected a flat array of uint8")
    if values.dtype != np.uint8 or values.ndim != 1:
        raise PeerError(f"the payload is {values.dtype} with {values.ndim} dimensions; expected a flat array of uint8")
    payload: bytes = values.tobytes()
    return payload
