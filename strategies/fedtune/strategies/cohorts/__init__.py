"""Who takes part in a round: selection by chance or by time, and the tier that each client trains."""
