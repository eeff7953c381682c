"""The Flower side (flwr 1.41): its messages, grids, apps and internals. No other package imports flwr."""
