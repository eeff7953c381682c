"""The host of a process: its files, signals, environment, clock and connections."""
