"""Message bundles: small messages that travel with all their objects in one request.

    POST /v1/fleet/take         TakeMessage -> Taken             a device asks for its next message
    POST /v1/fleet/bring        BringReply -> nothing            a device answers
    POST /v1/fedtune/send       SendMessages -> Sent             between the server's processes, on a private socket
    POST /v1/fedtune/collect    CollectReplies -> Collected      likewise

Flower transfers every object of a message in its own request. That lets the transfer of large adapters resume after a
broken connection, but a message of a hundred bytes takes eight requests. So a message of no more bytes than one piece
of a large one travels whole; larger messages are transferred by Flower. Flower's own messages are carried unchanged, as
serialised protobuf.

Bundles state no protocol version except in their paths: the registration must still reach a device of another version,
to tell both sides about it.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fedtune.core.protocol.messages import Payload

TAKE, BRING = "/v1/fleet/take", "/v1/fleet/bring"
SEND, COLLECT = "/v1/fedtune/send", "/v1/fedtune/collect"
MAX_BUNDLE_BYTES = 128 << 10  # objects between a device and the server; a piece of a large message has the same size
MAX_BATCH_BYTES = 4 << 20  # objects between the server's own processes
MAX_OBJECTS = 256  # objects of one message in a bundle
MAX_TAKE_BYTES = 64
MAX_TAKEN_BYTES = 16 << 20  # a large message comes without objects, but with the names of all

_ObjectId = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Proto = bytes
_Node = Annotated[int, Meta(ge=0)]
_Objects = dict[_ObjectId, bytes]


class TakeMessage(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A device's request for the next message to its node."""

    node: _Node


class Taken(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The next message to the node, if there is one.

    Args:
        found: a PullMessagesResponse.
        objects: all objects of the message, which then counts as received; or none, and the device pulls them.
    """

    found: _Proto
    objects: _Objects


class BringReply(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A whole reply of a device.

    Args:
        request: a PushMessagesRequest.
        objects: all objects of the reply.
    """

    request: _Proto
    objects: Annotated[_Objects, Meta(max_length=MAX_OBJECTS)]


class SendMessages(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Messages for devices.

    Args:
        request: a PushAppMessagesRequest; without messages it only announces.
        objects: objects of those messages, as many as fit.
        announced: nodes that may take their message now, one entry per message whose objects are all present.
        reply_bytes: for each message, the largest number of bytes that the payload of an honest reply can have.
    """

    request: _Proto
    objects: _Objects
    announced: tuple[_Node, ...]
    reply_bytes: tuple[Annotated[int, Meta(ge=0)], ...]


class Sent(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A PushAppMessagesResponse, which lists the objects that are still to be pushed."""

    pushed: _Proto


class CollectReplies(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A request for the replies to these messages."""

    ids: tuple[_ObjectId, ...]


class Collected(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The replies that have arrived.

    Args:
        found: a PullAppMessagesResponse.
        whole: message ids of the replies whose objects are all included; these replies count as received.
        objects: objects of those replies.
    """

    found: _Proto
    whole: tuple[_ObjectId, ...]
    objects: _Objects
