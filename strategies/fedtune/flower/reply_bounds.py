"""The replies that the server waits for, and what each may have it store: no more than its request could give.

    awaited.add(node, message_id, ReplyBound(payload_bytes))       # when the message is sent
    awaited.admit(reply)                                           # before anything of a reply is stored

Who asks knows how long an honest answer can be: a vote is a signature, and an update has the words of its segments. A
message has one reply, which may be announced again after a broken connection, as the same objects.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from fedtune.core.protocol.bundles import MAX_BUNDLE_BYTES
from fedtune.core.protocol.messages import HEADER_BYTES

MAX_PIECE_BODY_BYTES = MAX_BUNDLE_BYTES + 4096  # of the call that carries one piece of a large reply
_PIECES_BESIDE, _BYTES_BESIDE, _BYTES_BESIDE_EACH = 8, 4096, 256  # Flower's framing; measured: 4, 818 and 88
_KEPT = 16  # messages of a node whose replies are still taken
_OVER, _TOO_LARGE = 403, 413


@dataclass(frozen=True)
class ReplyBound:
    """The bound on one reply.

    Args:
        payload: largest number of bytes that an honest payload can have.
    """

    payload: int

    @property
    def pieces(self) -> int:
        """The largest number of objects."""
        return _PIECES_BESIDE + -(-self.payload // MAX_BUNDLE_BYTES)

    @property
    def size(self) -> int:
        """The largest number of bytes of all objects."""
        return self.payload + _BYTES_BESIDE + self.pieces * _BYTES_BESIDE_EACH

    @property
    def complaint(self) -> str:
        """The sentence about a reply that is larger."""
        return f"the reply has more than the {self.size} bytes that its request could give"


SHORT = ReplyBound(HEADER_BYTES)
"""The bound where nothing else was said: enough for an answer without a vector."""


@dataclass
class _Awaited:
    bound: ReplyBound
    tree: bytes = b""


class AwaitedReplies:
    """The messages without a reply, by node; of a node that never answers the oldest are forgotten."""

    def __init__(self) -> None:
        self._by_node: dict[int, OrderedDict[str, _Awaited]] = {}

    def add(self, node: int, message_id: str, bound: ReplyBound) -> None:
        """Waits for the reply to a message to a node."""
        waiting = self._by_node.setdefault(node, OrderedDict())
        waiting[message_id] = _Awaited(bound)
        while len(waiting) > _KEPT:
            waiting.popitem(last=False)

    def admit(self, reply: PushMessagesRequest, brought: int | None = None) -> None:
        """Takes note of a single reply by a device that was authenticated.

        Args:
            brought: bytes of its objects, where they come with it; None where they will come piece by piece.

        Raises:
            HTTPException: nobody waits for it or another one was announced, with the status by which a device knows
                that; or it is larger than its request could give.
        """
        (message,), (tree,) = reply.messages_list, reply.message_object_trees
        awaited = self._by_node.get(reply.node.node_id, {}).get(message.metadata.reply_to_message_id)
        shown = hashlib.sha256(tree.SerializeToString(deterministic=True)).digest()
        if awaited is None or awaited.tree not in (b"", shown):
            raise HTTPException(_OVER)
        bound = awaited.bound
        too_large = bound.size <= MAX_BUNDLE_BYTES if brought is None else brought > bound.size
        if too_large or next(islice(iterate_object_tree(tree), bound.pieces, None), None) is not None:
            raise HTTPException(_TOO_LARGE)
        awaited.tree = shown
