"""Messages with all their objects in one request each, where they are small enough for it.

    POST /v1/fleet/take         TakeMessage -> Taken             a device asks what waits for it
    POST /v1/fleet/bring        BringReply -> nothing            a device answers
    POST /v1/fedtune/send       SendMessages -> Sent             the server's own, on its private socket
    POST /v1/fedtune/collect    CollectReplies -> Collected      the server's own

Flower asks for every object of a message in a request of its own. That lets large adapters go on where a slow line
broke off, and costs a message of a hundred bytes eight requests. So what has no more bytes than one such piece travels
whole; everything larger goes Flower's way. What Flower itself says is carried as it is, as serialised protobuf.

Bundles state no protocol version but that in their paths: a device that speaks another one must still be reached by the
registration, which tells both sides so in words.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fedtune.core.protocol.messages import Payload

TAKE, BRING = "/v1/fleet/take", "/v1/fleet/bring"
SEND, COLLECT = "/v1/fedtune/send", "/v1/fedtune/collect"
MAX_BUNDLE_BYTES = 128 << 10  # of objects, between a device and the server: a piece of a large message has as many
MAX_BATCH_BYTES = 4 << 20  # of objects, between the server's own processes
MAX_OBJECTS = 256  # of one message in a bundle
MAX_TAKE_BYTES = 64
MAX_TAKEN_BYTES = 16 << 20  # a large message comes without objects, but with the names of all

_ObjectId = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Proto = bytes
_Node = Annotated[int, Meta(ge=0)]
_Objects = dict[_ObjectId, bytes]


class TakeMessage(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """What waits for this node?"""

    node: _Node


class Taken(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The message that waits, if any.

    Args:
        found: a PullMessagesResponse.
        objects: all that the message consists of, and then it counts as received; or none, and they are to be pulled.
    """

    found: _Proto
    objects: _Objects


class BringReply(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A reply, whole.

    Args:
        request: a PushMessagesRequest.
        objects: all that the reply consists of.
    """

    request: _Proto
    objects: Annotated[_Objects, Meta(max_length=MAX_OBJECTS)]


class SendMessages(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Messages for devices.

    Args:
        request: a PushAppMessagesRequest; without messages it only announces.
        objects: of those messages, as many as fit.
        announced: nodes that may take from now on, one entry a message whose objects are then all there.
    """

    request: _Proto
    objects: _Objects
    announced: tuple[_Node, ...]


class Sent(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A PushAppMessagesResponse, whose objects to push are those that have not come along."""

    pushed: _Proto


class CollectReplies(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """What answers these messages?"""

    ids: tuple[_ObjectId, ...]


class Collected(Payload, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """What has come.

    Args:
        found: a PullAppMessagesResponse.
        whole: message ids of the replies all of whose objects are here, and which count as received.
        objects: of those replies.
    """

    found: _Proto
    whole: tuple[_ObjectId, ...]
    objects: _Objects
