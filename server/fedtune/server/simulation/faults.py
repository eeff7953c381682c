"""Failure injection: clients that vanish, raise or dawdle, each drawn from the job's seed, so that a run repeats.

A Flower mod around the ClientApp; the federation sees what it would see of a real client.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.app import Context, Message

from fedtune.core.job.settings import SimulationSettings
from fedtune.core.protocol.actions import SECURE_EXCHANGES, TRAIN
from fedtune.core.seeds import generator

Call = Callable[[Message, Context], Message]


class VanishedError(ConnectionError):
    """An injected dropout: the client is gone, nothing comes back."""


class InjectedError(RuntimeError):
    """An injected failure inside a client."""


def fault_mod(settings: SimulationSettings, seed: int, secure: bool) -> Callable[[Message, Context, Call], Message]:
    """A mod that lets clients of a training round fail with the probabilities that the job states.

    Args:
        secure: whether a round takes several exchanges; who vanishes then does so before any one of them, drawn evenly.
    """
    exchanges = SECURE_EXCHANGES if secure else (TRAIN,)

    def inject(message: Message, context: Context, call_next: Call) -> Message:
        kind = message.metadata.message_type
        if kind not in exchanges:
            return call_next(message, context)
        random = generator(seed, "faults", message.metadata.group_id, message.metadata.dst_node_id)
        vanishes, fails, dawdles = random.random(3) < (settings.dropout, settings.failing, settings.slow)
        if vanishes and exchanges.index(kind) >= random.integers(len(exchanges)):
            raise VanishedError("the client vanished (simulation.dropout)")
        if kind != TRAIN:
            return call_next(message, context)
        if fails:
            raise InjectedError("the client failed (simulation.failing)")
        if dawdles:
            time.sleep(settings.slow_seconds)
        return call_next(message, context)

    return inject
