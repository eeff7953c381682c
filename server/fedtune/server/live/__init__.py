"""The server of a fleet: its folder and keys, enrolled devices, queued jobs, and the process that serves them."""
