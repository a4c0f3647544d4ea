"""tui-trainer: the debugger for neural-network training, in the terminal."""

from __future__ import annotations

__version__ = "0.1.0"
