"""Scalar graphs: small expressions whose values and gradients are computed one node at a time."""
