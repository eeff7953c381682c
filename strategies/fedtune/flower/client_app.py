"""The Flower ClientApp: requests in, replies out, on a device that stays warm between them.

    app = client_app(device)                              # updates in the clear
    app = client_app(device, credentials=credentials)     # updates masked, and in no other way

The name of the client that answers is `context.node_config["client"]`, or the node's partition under stock Flower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.client.device import Device
from fedtune.client.secure_rounds import Credentials, SecureRounds
from fedtune.core.protocol.actions import OPEN, SHARE, UNMASK, VOTE
from fedtune.core.protocol.payloads import EvaluateRequest, TrainRequest, decode, encode
from fedtune.flower.envelope import seal, unseal, unseal_parts

Call = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Call], Message]


def client_app(
    device: Device, mods: Sequence[Mod] = (), credentials: Callable[[str], Credentials] | None = None
) -> ClientApp:
    """The ClientApp that lets a device serve a federation.

    Args:
        device: it is used by one message at a time.
        mods: Flower mods around every message.
        credentials: client -> what it brings to secure rounds. With them the device sends no update in the clear,
            whatever a server asks for; without them it takes no part in secure rounds.
    """
    app = ClientApp(mods=list(mods))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        request = decode(unseal(message), EvaluateRequest)
        return Message(seal(encode(device.evaluate(client_name(context), request))), reply_to=message)

    if credentials is None:
        _serve_in_the_clear(app, device)
    else:
        _serve_under_secure_aggregation(app, SecureRounds(device, credentials))
    return app


def client_name(context: Context) -> str:
    """Which client a node stands for."""
    config = context.node_config
    return str(config["client"] if "client" in config else config.get("partition-id", context.node_id))


def _serve_in_the_clear(app: ClientApp, device: Device) -> None:
    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = decode(unseal(message), TrainRequest)
        return Message(seal(encode(device.train(client_name(context), request))), reply_to=message)


def _serve_under_secure_aggregation(app: ClientApp, rounds: SecureRounds) -> None:
    @app.query(OPEN)
    def open_(message: Message, context: Context) -> Message:
        config, request = unseal_parts(message, 2)
        return Message(seal(rounds.open(client_name(context), config, request)), reply_to=message)

    def answer_with(step: Callable[[str, bytes], bytes]) -> Call:
        def answer(message: Message, context: Context) -> Message:
            return Message(seal(step(client_name(context), unseal(message))), reply_to=message)

        return answer

    app.query(SHARE)(answer_with(rounds.share))
    app.train()(answer_with(rounds.train))
    app.query(VOTE)(answer_with(rounds.vote))
    app.query(UNMASK)(answer_with(rounds.unmask))
