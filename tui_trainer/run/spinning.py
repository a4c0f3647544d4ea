"""How OpenMP's threads wait for each other: settled once, before torch is imported."""

from __future__ import annotations

import os

from tui_trainer.config.machine import Others, cores
from tui_trainer.config.spec import RunSpec

SPIN_COUNT = "10000"
"""Turns that an OpenMP thread spins at a barrier before it sleeps, where others need the cores."""
TOLERATED_CORES = 0.5
"""What others may use besides: a screen now and then takes a core from nobody for long."""


def bound_openmp_spinning(spec: RunSpec, others: Others) -> None:
    """Let OpenMP's threads sleep soon at barriers where other programs use the cores that they
    would spin on, unless the user chose otherwise.

    GNU's runtime spins 300,000 turns at each barrier, some 15 ms. On a machine that has nothing
    else to do that is best: a thread that sleeps has to be woken, and steps take up to a quarter
    longer. Where more threads want to run than there are cores, the spinners hold those that the
    thread they wait for needs, and steps take twenty times as long (docs/decisions.md has the
    figures). Results do not change. It must be said before torch is imported.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    available = cores()
    if expected_threads(spec, available) + others.cores() > available + TOLERATED_CORES:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def expected_threads(spec: RunSpec, available: int) -> int:
    """How many PyTorch will use at most: a task's as asked for, or all cores but one; a script's as
    in its environment, or all."""
    if spec.task != "script":
        return int(spec.configuration.get("threads") or 0) or max(1, available - 1)
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdigit() and int(asked) else available
