"""Flower messages as bytes and back, by Flower's own serialisation, so that simulated machines share nothing.

What a client receives is what it would receive over a network: nothing unserialisable passes, and nothing is shared by
accident between server and clients.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


@dataclass(frozen=True)
class WireMessage:
    """A serialised message: Flower's content-addressed objects, the root's address and the message's own id."""

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
    set_message_id(message, wire.message_id)
    return message


def set_message_id(message: Message, message_id: str) -> None:
    """Gives a message the id that a SuperLink would have given it; replies refer to it."""
    message.metadata.__dict__["_message_id"] = message_id
