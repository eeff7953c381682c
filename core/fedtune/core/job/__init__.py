"""A job: its settings, its file, and what in it contradicts itself."""
