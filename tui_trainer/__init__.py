"""tui-trainer: the debugger for neural-network training, in the terminal."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {"log": "tui_trainer.run.scalars", "watch": "tui_trainer.run.watch"}
"""What scripts and notebooks use, and the module that has it: imported when it is first used."""


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_PUBLIC[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
