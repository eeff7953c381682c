"""Local training with torch: the trainer with its memory limits, and the backend that plans measure with."""
