"""Widgets and drawing that are not specific to one instrument."""
