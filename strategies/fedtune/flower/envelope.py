"""Payloads inside a Flower message: one RecordDict with one Array of uint8 each, because many small arrays are slow.

Measured on flwr 1.41 over HTTP: 448 arrays of 32 KB took 29 s, the same bytes in one array 6.4 s. A message has one
part, or two where one of them is the same for many clients: Flower stores equal arrays once. Short parts go into a
ConfigRecord instead: an Array travels as three objects with a request each, both ways, a ConfigRecord as one.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import Node
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufRequestContext

from fedtune.core.errors import PeerError
from fedtune.core.protocol.payloads import Payload, encode

MAX_PARTS = 2
MAX_SHORT_BYTES = 4096  # of all parts together

_RECORD = "fedtune"
_PARTS = tuple(f"part-{index}" for index in range(MAX_PARTS))


def seal(*parts: bytes) -> RecordDict:
    """The content of a Flower message that carries the parts."""
    if sum(map(len, parts)) <= MAX_SHORT_BYTES:
        return RecordDict({_RECORD: ConfigRecord(dict(zip(_PARTS, parts, strict=False)))})
    arrays = {name: Array(np.frombuffer(part, dtype=np.uint8)) for name, part in zip(_PARTS, parts, strict=False)}
    return RecordDict({_RECORD: ArrayRecord(arrays)})


def unseal(message: Message) -> bytes:
    """The one part that a Flower message carries.

    Raises:
        PeerError: as `unseal_parts`, or it carries more parts than one.
    """
    (payload,) = unseal_parts(message, 1)
    return payload


def unseal_parts(message: Message, count: int) -> tuple[bytes, ...]:
    """The parts that a Flower message carries.

    Raises:
        PeerError: the message carries an error instead, or something other than so many flat arrays of uint8.
    """
    if message.has_error():
        raise PeerError(f"no answer: {message.error.reason or 'unknown reason'} (code {message.error.code})")
    content = message.content
    record = content.get(_RECORD)
    if len(content) != 1 or not isinstance(record, ArrayRecord | ConfigRecord) or tuple(record) != _PARTS[:count]:
        raise PeerError(f"a message with the records {list(content)}; expected one named {_RECORD} of {count} parts")
    return tuple(map(_bytes, record.values()))


def post(client: ProtobufClient, path: str, payload: Payload) -> bytes:
    """The answer to a call that carries a bare payload, over the connections and with the headers of Flower's client.

    Raises:
        httpx.HTTPError: there is none.
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
    except Exception as error:  # numpy believes the header: MemoryError, tokenize's errors and more are the sender's
        raise PeerError(f"the payload is not a readable array: {error}") from error
    if not isinstance(values, np.ndarray):  # an archive of some
        raise PeerError(f"the payload is {type(values).__name__}; expected a flat array of uint8")
    if values.dtype != np.uint8 or values.ndim != 1:
        raise PeerError(f"the payload is {values.dtype} with {values.ndim} dimensions; expected a flat array of uint8")
    payload: bytes = values.tobytes()
    return payload
