"""Flower's content-addressed objects in its own state: read and stored with the message that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import SqlLinkState
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from fedtune.core.errors import PeerError

MAX_OBJECTS = 256  # objects of one message in a bundle


def read_objects(state: SqlLinkState, run_id: int, tree: ObjectTree, limit: int) -> dict[str, bytes]:
    """Returns all objects of a message; none if one is missing, or if they are too many or too large."""
    objects: dict[str, bytes] = {}
    for part in iterate_object_tree(tree):
        content = state.get_object(run_id, part.object_id)
        limit -= len(content or b"")
        if not content or limit < 0 or len(objects) == MAX_OBJECTS:
            return {}
        objects[part.object_id] = content
    return objects


def store_objects(
    state: SqlLinkState, run_id: int, session_id: str, object_ids: Iterable[str], objects: Mapping[str, bytes]
) -> None:
    """Stores the named objects.

    Raises:
        PeerError: a content does not match its id; the transaction then drops the whole message.
    """
    for object_id in object_ids:
        if not state.store_object(run_id, session_id, object_id, objects[object_id]):
            raise PeerError("an object's content does not match its id")
