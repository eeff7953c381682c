"""The adapter: its layout in one flat vector, and what is done to it as a whole."""
