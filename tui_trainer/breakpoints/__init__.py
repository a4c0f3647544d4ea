"""Breakpoints: conditions at which a run pauses, evaluated on its training thread."""
