"""Measurements in bounded memory, drawn at any zoom without losing an extreme. numpy only."""

from __future__ import annotations

from tui_trainer.history.history import History
from tui_trainer.history.records import ClipRecord, Floats, StepRecord
from tui_trainer.history.table import TableHistory
from tui_trainer.history.window import Window

__all__ = ["ClipRecord", "Floats", "History", "StepRecord", "TableHistory", "Window"]
