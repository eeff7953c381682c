"""Flower's two kinds of app around plain functions, for `flwr run` and any SuperLink.

app = server_app(main)             # main(grid, run_config)
app = client_app(answer)           # answer(run_config, partition, request) -> the reply's payload
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import Context, Message
from flwr.clientapp import ClientApp as ClientApp
from flwr.serverapp import Grid as Grid
from flwr.serverapp import ServerApp as ServerApp

from fedtune.core.protocol.messages import Request
from fedtune.flower.envelope import request_of, seal

RunConfig = Mapping[str, bool | float | int | str]


def server_app(main: Callable[[Grid, RunConfig], None]) -> ServerApp:
    """Returns a ServerApp that runs `main` with its grid and its run configuration."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        main(grid, context.run_config)

    return app


def client_app(answer: Callable[[RunConfig, int, Request], bytes]) -> ClientApp:
    """Returns a ClientApp that answers training and evaluation for the client of its node's partition."""
    app = ClientApp()

    def reply(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        return Message(seal(answer(context.run_config, partition, request_of(message))), reply_to=message)

    app.train()(reply)
    app.evaluate()(reply)
    return app
