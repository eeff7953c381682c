"""The cloud side: rounds, checkpoints, evaluation, reports, the command line; and simulation.

Of these modules, only `simulation` imports the client's side too.
"""
