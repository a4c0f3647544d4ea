"""Scalar graphs to begin with: the chain rule, one weight, a neuron, a net of two layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A built-in expression."""

    name: str
    title: str
    text: str
    values: Mapping[str, float]
    raise_: str
    """The input to move first in gradient descent."""


EXAMPLES = (
    Example(
        "chain",
        "the chain rule",
        "e = a*b; d = e + c; L = d*f",
        {"a": 2.0, "b": -3.0, "c": 10.0, "f": -2.0},
        "a",
    ),
    Example(
        "weight",
        "one weight and a squared error",
        "p = w*x; d = p - y; L = d**2",
        {"w": 0.5, "x": 1.5, "y": 3.0},
        "w",
    ),
    Example(
        "neuron",
        "a neuron",
        "p1 = w1*x1; p2 = w2*x2; s = p1 + p2; n = s + b; o = tanh(n)",
        {"w1": -3.0, "x1": 2.0, "w2": 1.0, "x2": 0.0, "b": 6.881373587019543},
        "w1",
    ),
    Example(
        "net",
        "a net of two layers with a squared error",
        "n1 = w1*x1 + w2*x2 + b1; h1 = tanh(n1); n2 = w3*x1 + w4*x2 + b2; h2 = tanh(n2); "
        "o = v1*h1 + v2*h2 + c; d = o - y; L = d**2",
        {
            "x1": 1.0, "x2": -0.5, "w1": 0.6, "w2": -0.4, "b1": 0.1, "w3": -0.3, "w4": 0.8,
            "b2": 0.0, "v1": 0.7, "v2": 0.5, "c": 0.2, "y": -1.0,
        },
        "v1",
    ),
)  # fmt: skip
