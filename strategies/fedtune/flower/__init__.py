"""Everything that knows Flower: its messages, grids, apps and internals (flwr 1.41). No other package imports flwr."""
