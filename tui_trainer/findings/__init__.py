"""Rules that judge what is measured, and the engine that asks them after every step."""
