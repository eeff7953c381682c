"""The things that bind a device: the terms of a job, all that a round asks by them, and the fleet owner's signature."""
