"""The server of a fleet: its folder and keys, who is enrolled, the jobs that wait, and the process that serves them."""
