"""Typed configuration: what can be set, with defaults, bounds and presets, and the run's files.

Imports fast and without torch, since the command line and the start screen read it first.
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
