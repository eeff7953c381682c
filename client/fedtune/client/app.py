"""The Flower ClientApp: requests in, replies out, on a device that stays warm between them.

    app = client_app(device)

The name of the client that answers is `context.node_config["client"]`, or the node's partition under stock Flower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.client.device import Device
from fedtune.core.messages import EvaluateRequest, TrainRequest, decode, encode
from fedtune.strategies.envelope import seal, unseal

Call = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Call], Message]


def client_app(device: Device, mods: Sequence[Mod] = ()) -> ClientApp:
    """The ClientApp that lets a device serve a federation.

    Args:
        device: it is used by one message at a time.
        mods: Flower mods around every message.
    """
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = decode(unseal(message), TrainRequest)
        return Message(seal(encode(device.train(client_name(context), request))), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        request = decode(unseal(message), EvaluateRequest)
        return Message(seal(encode(device.evaluate(client_name(context), request))), reply_to=message)

    return app


def client_name(context: Context) -> str:
    """Which client a node stands for."""
    config = context.node_config
    return str(config["client"] if "client" in config else config.get("partition-id", context.node_id))
