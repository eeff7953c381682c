"""The fleet owner's side: the key that approves devices and signs jobs; no server process imports it."""
