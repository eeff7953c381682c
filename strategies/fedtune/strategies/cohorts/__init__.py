"""Cohorts: uniform and timed selection, the tier that each client trains, and groups with sums of their own."""
