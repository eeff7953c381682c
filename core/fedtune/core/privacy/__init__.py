"""Differential privacy: exact noise for sums in a ring, and the guarantee that it gives, in numbers."""
