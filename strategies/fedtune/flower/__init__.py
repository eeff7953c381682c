"""The Flower side (flwr 1.41): its messages, grids, apps and internals. No other package imports flwr.

`strategy.AdapterStrategy` is for anyone's ServerApp; the two apps for `flwr run` are in
`fedtune.server.simulation.stock_flower`. Devices use `envelope`, `fleet_link` and `signed_http`, which import
`fedtune.core` and each other alone; everything else here is the server's.
"""
