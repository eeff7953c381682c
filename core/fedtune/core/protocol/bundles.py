"""Message bundles between the server's own processes: messages that travel with their objects in one request.

    POST /v1/fedtune/send       SendMessages -> Sent             on the private socket
    POST /v1/fedtune/collect    CollectReplies -> Collected      likewise

Flower transfers every object of a message in its own request, eight for a message of a hundred bytes. Its messages are
carried unchanged, as serialised protobuf.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fedtune.core.protocol.messages import Payload

SEND, COLLECT = "/v1/fedtune/send", "/v1/fedtune/collect"
MAX_BATCH_BYTES = 4 << 20  # objects between the server's own processes

_ObjectId = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Proto = bytes
_Node = Annotated[int, Meta(ge=0)]
_Objects = dict[_ObjectId, bytes]


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
