"""Inspects the tensors of a run on its training thread, at the gate, without changing any."""
