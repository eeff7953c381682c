"""Replies as they arrive: push, then poll, yielding each once, so that no more than one is held in memory.

Flower's `Grid.send_and_receive` returns when the last reply is there, holding them all, and sleeps 3 s between polls.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

FIRST_POLL_SECONDS = 0.001
LAST_POLL_SECONDS = 0.25


def stream_replies(grid: Grid, messages: Iterable[Message], deadline: float | None) -> Iterator[Message]:
    """Sends the messages and yields their replies in order of arrival.

    Args:
        grid: where to send them.
        messages: each to one node.
        deadline: seconds to wait for the last reply, or None to wait for all.
    """
    end = None if deadline is None else time.monotonic() + deadline
    waiting = {message_id for message_id in grid.push_messages(messages) if message_id}
    pause = FIRST_POLL_SECONDS
    while waiting and (end is None or time.monotonic() < end):
        arrived = list(grid.pull_messages(list(waiting)))
        waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
        yield from arrived
        if arrived:
            pause = FIRST_POLL_SECONDS
        else:
            time.sleep(pause)
            pause = min(2 * pause, LAST_POLL_SECONDS)
