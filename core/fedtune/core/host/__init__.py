"""The machine that a process runs on: its files, signals, environment and connections."""
