"""Examines what attention layers attend to, and what they add to the residual stream."""
