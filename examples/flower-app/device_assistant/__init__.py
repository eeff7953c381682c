"""fedtune's demo as a stock Flower app."""
