"""A call to the SuperLink, whose every failure is one error: the run goes on from its last round in a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from fedtune.core.errors import PeerError, RunError

T = TypeVar("T")


class LinkLostError(RunError):
    """The SuperLink does not answer, or no longer knows the run; the run goes on from its last round in a new one."""


def called(call: Callable[[Any], T], request: Any, alive: Callable[[], bool]) -> T:
    """The answer to a request.

    Args:
        alive: whether the process that listens still runs; without it a call would wait for an answer until its time
            is over, for this process holds the sockets open.

    Raises:
        LinkLostError: there is none.
    """
    if not alive():
        raise LinkLostError("the listening process has ended")
    try:
        return call(request)
    except httpx.HTTPStatusError as error:
        text = error.response.text[:200]
        raise LinkLostError(f"the SuperLink answered {error.response.status_code}: {text}") from error
    except (httpx.HTTPError, OSError, ValueError, PeerError) as error:
        raise LinkLostError(f"the SuperLink does not answer: {error or type(error).__name__}") from error
