"""Typed configuration: what can be set, its bounds and defaults, and clear refusals of bad values.

Free of torch and fast to import: the command line and the start screen read it before anything
trains.
"""

from __future__ import annotations

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import Option, options_of, parse
from tui_trainer.config.training import TrainingConfig, default_preset, from_flat, resolve, to_flat

__all__ = [
    "ConfigurationError",
    "Option",
    "TrainingConfig",
    "default_preset",
    "from_flat",
    "options_of",
    "parse",
    "resolve",
    "to_flat",
]
