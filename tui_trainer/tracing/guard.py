"""Our own time, and our own faults: neither may become the training's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from time import perf_counter
from typing import Concatenate, ParamSpec, TypeVar

from tui_trainer.tracing.faults import describe
from tui_trainer.tracing.gate import Gate
from tui_trainer.tracing.interface import RecorderLike

P = ParamSpec("P")
R = TypeVar("R")


class Guarded:
    """Base of what runs on the training thread in the middle of a script's own calls."""

    def __init__(self, recorder: RecorderLike, gate: Gate) -> None:
        self.recorder = recorder
        self.gate = gate
        self.owner = 0
        """Identity of the thread that trains; 0 while detached or suspended."""
        self.own_s = 0.0
        """Our own time since it was last asked for, the gate's not counted."""
        self._broken = False

    def fault(self, where: str, fault: Exception) -> None:
        """A fault of our own: say it once and go on blind; the training never hears of it."""
        self.owner = 0
        if not self._broken:
            self._broken = True
            text = f"tracing is switched off: {where}: {describe(fault)}"
            self.recorder.notice("fault", text, "error")


G = TypeVar("G", bound=Guarded)


def guarded(method: Callable[Concatenate[G, P], R]) -> Callable[Concatenate[G, P], R]:
    """Count our own time, and let no fault of ours reach the training.

    Only `StopTraining` and other non-`Exception`s pass. A method that answers whether a phase has
    begun answers False after a fault.
    """

    @functools.wraps(method)
    def guarding(self: G, *args: P.args, **kwargs: P.kwargs) -> R:
        began, idle = perf_counter(), self.gate.idle_s
        try:
            return method(self, *args, **kwargs)
        except Exception as fault:
            self.fault(method.__name__, fault)
            return False  # type: ignore[return-value] # "pass by" for those that answer
        finally:
            self.own_s += perf_counter() - began - (self.gate.idle_s - idle)

    return guarding  # type: ignore[return-value] # functools.wraps names `self`
