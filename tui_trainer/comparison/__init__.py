"""Comparing recorded runs: series on one axis, settings, and where the runs first differ."""
