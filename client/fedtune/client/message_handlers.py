"""Message handlers: a device's answers to each type of message, in the clear and under secure aggregation.

handler = handle_in_the_clear(device)
handler = handle_under_secure_aggregation(device, credentials)
payload = handler("kitchen", request)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedtune.client.device import Device
from fedtune.client.secure_rounds import Credentials, SecureRounds
from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import (
    EVALUATE,
    OPEN,
    SHARE,
    TRAIN,
    UNMASK,
    VOTE,
    EvaluateRequest,
    Handler,
    Request,
    TrainRequest,
    decode,
    encode,
    query,
)
from fedtune.core.spans import span

_Step = Callable[[str, tuple[bytes, ...]], bytes]


def handle_in_the_clear(device: Device) -> Handler:
    """Returns a handler that sends updates in the clear, and takes no part in secure rounds."""

    def train(client: str, parts: tuple[bytes, ...]) -> bytes:
        return encode(device.train(client, decode(parts[0], TrainRequest)))

    return _dispatch({TRAIN: train, EVALUATE: _evaluation(device)})


def handle_under_secure_aggregation(device: Device, credentials: Callable[[str], Credentials]) -> Handler:
    """Returns a handler that sends only masked updates, whatever a server asks for.

    Args:
        credentials: client -> its identity, roster, policy and log for secure rounds.
    """
    rounds = SecureRounds(device, credentials)
    return _dispatch(
        {
            query(OPEN): lambda client, parts: rounds.open(client, *parts),
            query(SHARE): lambda client, parts: rounds.share(client, *parts),
            TRAIN: lambda client, parts: rounds.train(client, *parts),
            query(VOTE): lambda client, parts: rounds.vote(client, *parts),
            query(UNMASK): lambda client, parts: rounds.unmask(client, *parts),
            EVALUATE: _evaluation(device),
        }
    )


def _evaluation(device: Device) -> _Step:
    def evaluate(client: str, parts: tuple[bytes, ...]) -> bytes:
        return encode(device.evaluate(client, decode(parts[0], EvaluateRequest)))

    return evaluate


def _dispatch(steps: Mapping[str, _Step]) -> Handler:
    def handle(client: str, request: Request) -> bytes:
        if request.action not in steps:
            raise PeerError(f"asked for {request.action}, which is no part of this job's rounds")
        with span(f"exchange {request.action}", client):
            return steps[request.action](client, request.parts)

    return handle
