"""The clients' side: `flwr run` finds `app` here."""

from fedtune.server.simulation.stock_flower import flower_client_app

app = flower_client_app()
