"""Replies as they arrive: push, then poll, yielding each once, so that no more than one is held in memory.

Flower's `Grid.send_and_receive` returns when the last reply is there, holding them all, and sleeps 3 s between polls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.strategies.schedule import Closing

FIRST_POLL_SECONDS = 0.001
LAST_POLL_SECONDS = 0.25


def stream_replies(
    grid: Grid, messages: Iterable[Message], deadline: float | None, closing: Closing | None = None
) -> Iterator[Message]:
    """Sends the messages and yields their replies in order of arrival.

    Args:
        grid: where to send them.
        messages: each to one node.
        deadline: seconds to wait for the last reply, or None to wait for all.
        closing: when to go on before all are there; errors do not count as answers.
    """
    started, answers = time.monotonic(), 0
    end = math.inf if deadline is None else started + deadline
    waiting = {message_id for message_id in grid.push_messages(messages) if message_id}
    pause = FIRST_POLL_SECONDS
    while waiting and time.monotonic() < end:
        arrived = list(grid.pull_messages(list(waiting)))
        waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
        answers += sum(not reply.has_error() for reply in arrived)
        yield from arrived
        if closing and (answers >= closing.enough or _is_late(closing, started, answers)):
            return
        if arrived:
            pause = FIRST_POLL_SECONDS
        else:
            time.sleep(pause)
            pause = min(2 * pause, LAST_POLL_SECONDS)


def _is_late(closing: Closing, started: float, answers: int) -> bool:
    return answers >= closing.least and time.monotonic() >= started + closing.seconds
