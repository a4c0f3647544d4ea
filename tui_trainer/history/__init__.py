"""Measurements in bounded memory, drawn at any zoom without losing an extreme. numpy only."""

from __future__ import annotations

from tui_trainer.history.buckets import ClipRecord, Floats, StepRecord, Window
from tui_trainer.history.history import History
from tui_trainer.history.series import MemorySeries

__all__ = ["ClipRecord", "Floats", "History", "MemorySeries", "StepRecord", "Window"]
