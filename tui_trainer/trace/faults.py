"""Catches the tracer's own exceptions and times its overhead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from time import perf_counter
from typing import Protocol, TypeVar, TypeVarTuple

from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import RecorderLike, describe_exception

MAX_FAULTS = 3
"""Faulty steps in a row after which tracing is switched off."""


class Faults:
    """Reports faults, counts the steps that they ended, and times the guarded methods."""

    def __init__(
        self, recorder: RecorderLike, gate: Gate, give_up_step: Callable[[str, Exception], None]
    ) -> None:
        """`give_up_step(where, fault)` ends the measurement of the current step."""
        self._recorder = recorder
        self._reported: set[str] = set()
        self.gate = gate
        self.give_up_step = give_up_step
        self.given_up = False
        """Whether a fault has ended the measurement of the current step."""
        self.in_a_row = 0
        """Steps in a row that were abandoned."""
        self.own_s = 0.0
        """Our overhead in seconds since it was last accounted for, without time in the gate."""

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= MAX_FAULTS

    def give_up(self) -> None:
        """Do not measure the current step."""
        self.given_up = True
        self.in_a_row += 1

    def report(self, where: str, fault: Exception) -> None:
        """Report a fault, the same one only once."""
        text = describe_exception(fault)
        if text not in self._reported:
            self._reported.add(text)
            self._recorder.notice("fault", f"{where}: {text}", "error")


class HasFaults(Protocol):
    """An object with guarded methods."""

    faults: Faults


S = TypeVar("S", bound=HasFaults)
Ts = TypeVarTuple("Ts")
R = TypeVar("R")


def guarded(method: Callable[[S, *Ts], R], always: bool = False) -> Callable[[S, *Ts], R]:
    """Count our own time, and keep our exceptions away from the training.

    Only `StopTraining` and other non-`Exception`s pass. A fault ends the measurement of the current
    step: until its end only methods that are `always` called do anything. A method that returns
    whether a phase begins returns False then.
    """

    @functools.wraps(method)
    def wrapper(self: S, *args: *Ts) -> R:
        faults = self.faults
        if faults.given_up and not always:
            return False  # type: ignore[return-value] # "no phase" for those that return a bool
        gate = faults.gate
        began = perf_counter() - gate.idle_s
        try:
            return method(self, *args)
        except Exception as fault:
            faults.give_up_step(method.__name__, fault)
            return False  # type: ignore[return-value]
        finally:
            faults.own_s += perf_counter() - gate.idle_s - began

    return wrapper


def always_guarded(method: Callable[[S, *Ts], R]) -> Callable[[S, *Ts], R]:
    return guarded(method, always=True)
