"""Typed configuration: what can be set, with defaults, bounds and presets, and the run's files.

Imports fast and without torch, since the command line and the start screen read it first.
"""
