"""What runs in the cloud: rounds, checkpoints, evaluation, reports, the command line; and simulation.

Of this package only `simulation` sees the client's side too.
"""
