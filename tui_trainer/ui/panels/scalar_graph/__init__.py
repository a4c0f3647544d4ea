"""Panels of the scalar graph."""
