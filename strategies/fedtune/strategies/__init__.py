"""The server's side of a round: cohort selection, collection and aggregation of updates, and server optimizers.

numpy only; `fedtune.flower` runs it as a Flower Strategy.
"""
