"""Messages between the screen and the process that measures the values of pages."""

from __future__ import annotations

import math

import msgspec

Value = bool | int | float | str | list[float | int | str]
"""A number, a text, or a vector. Floats are finite."""


class PageMeasurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The measured values of one page."""

    page: str
    seed: int
    values: dict[str, Value]
    """Values by the name of the placeholder."""
    milliseconds: float
    torch: str
    """Version of PyTorch."""


class PageFailure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The reason why a measurement could not be run."""

    message: str
    hint: str = ""


class PageRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The page to measure, and the seed of its random numbers."""

    page: str
    seed: int


def all_finite(values: dict[str, Value]) -> bool:
    """Whether no value is nan or infinite: JSON could not hold it, and no page states one."""
    return all(
        not isinstance(item, float) or math.isfinite(item)
        for value in values.values()
        for item in (value if isinstance(value, list) else [value])
    )
