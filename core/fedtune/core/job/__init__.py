"""The job: its settings, its file, and the check for contradictions between settings."""
