"""Amounts of memory as they are typed."""

from __future__ import annotations

import math
import re

from tui_trainer.config.errors import ConfigurationError

UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(?:I?B)?\s*\Z", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of `512MB`, `1.5G`, `0`; units are powers of 1024. Raises ConfigurationError."""
    match = _SIZE.match(text)
    value = float(match[1]) * UNITS[match[2].upper()] if match else math.inf
    if not value < 2**60:
        raise ConfigurationError(f"{text!r} is no amount of memory", "for example 512MB or 2GB")
    return int(value)
