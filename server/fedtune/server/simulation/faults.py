"""Fault injection: clients that vanish, raise or are slow, drawn from the job's seed, so that runs are reproducible.

It wraps the handler of the clients' messages; the federation sees the same as from a real client.
"""

from __future__ import annotations

import time

from fedtune.core.job.settings import SimulationSettings
from fedtune.core.protocol.messages import SECURE_EXCHANGES, TRAIN, Handler, Request
from fedtune.core.seeds import generator


class VanishedError(ConnectionError):
    """An injected dropout: the client vanishes without an answer."""


class InjectedError(RuntimeError):
    """An injected failure inside a client."""


def with_faults(handler: Handler, settings: SimulationSettings, seed: int, secure: bool) -> Handler:
    """Returns a handler with which clients of a training round fail with the job's probabilities.

    Args:
        secure: whether a round has several exchanges; a client then vanishes before one of them, drawn evenly.
    """
    exchanges = SECURE_EXCHANGES if secure else (TRAIN,)

    def handle(client: str, request: Request) -> bytes:
        if request.action not in exchanges:
            return handler(client, request)
        random = generator(seed, "faults", request.group, client)
        vanishes, fails, is_slow = random.random(3) < (settings.dropout, settings.failing, settings.slow)
        if vanishes and exchanges.index(request.action) >= random.integers(len(exchanges)):
            raise VanishedError("the client vanished (simulation.dropout)")
        if request.action != TRAIN:
            return handler(client, request)
        if fails:
            raise InjectedError("the client failed (simulation.failing)")
        if is_slow:
            time.sleep(settings.slow_seconds)
        return handler(client, request)

    return handle
