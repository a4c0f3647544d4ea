"""Measurements in bounded memory, drawn at any zoom without losing an extreme. numpy only."""

from __future__ import annotations

from tui_trainer.history.history import History, MemoryHistory
from tui_trainer.history.records import ClipRecord, Floats, StepRecord
from tui_trainer.history.series import MemorySeries, SeriesReader
from tui_trainer.history.window import Window

__all__ = [
    "ClipRecord",
    "Floats",
    "History",
    "MemoryHistory",
    "MemorySeries",
    "SeriesReader",
    "StepRecord",
    "Window",
]
