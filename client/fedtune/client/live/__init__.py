"""A device of a live fleet: its folder and keys, and the one process that answers the server and opens no port.

Flower's internals are used in `fleet.py` alone.
"""
