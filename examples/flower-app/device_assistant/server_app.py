"""The server's side: `flwr run` finds `app` here."""

from fedtune.server.simulation.stock_flower import flower_server_app

app = flower_server_app()
