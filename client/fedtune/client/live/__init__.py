"""A device of a live fleet: its folder and keys, and the one process that answers the server and opens no port."""
