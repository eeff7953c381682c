"""The server of a fleet: its folder and keys, who is enrolled, the jobs that wait, and the process that serves them.

Flower's internals are used in `flower.py`, `grid.py` and `bundles.py` alone.
"""
