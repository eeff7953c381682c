"""The adapter: its layout in one flat vector, its tiers, and changes of its basis."""
