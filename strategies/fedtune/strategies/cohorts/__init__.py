"""Cohorts: uniform and timed selection, and the tier that each client trains."""
