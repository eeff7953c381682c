"""The ServerApp, which `flwr run` finds as `app`."""

from fedtune.server.simulation.stock_flower import flower_server_app

app = flower_server_app()
