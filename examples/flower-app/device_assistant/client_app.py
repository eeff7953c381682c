"""The ClientApp, which `flwr run` finds as `app`."""

from fedtune.server.simulation.stock_flower import flower_client_app

app = flower_client_app()
