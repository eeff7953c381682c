"""A live device: its folder and keys, and the process that answers the server's messages without an open port."""
