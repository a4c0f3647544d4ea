"""Rules that check the measurements, and the engine that evaluates them after every step."""
