"""Local training with torch: the trainer, the memory it keeps to, and what a plan is measured with."""
