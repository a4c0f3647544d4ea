"""How OpenMP's threads wait for each other: settled once, before torch is imported."""

from __future__ import annotations

import os

import psutil  # type: ignore[import-untyped, unused-ignore]

from tui_trainer.config.machine import Others, allowed_cores, cores, quota
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
    threads = expected_threads(spec)
    crowded = threads + others.cores() > allowed_cores() + TOLERATED_CORES
    if crowded or threads > quota() + TOLERATED_CORES:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def expected_threads(spec: RunSpec) -> int:
    """How many PyTorch will use at most: a task's as asked for, or all cores but one; a script's as
    in its environment, or as many as there are cores, of which PyTorch knows no quota."""
    if spec.task != "script":
        asked = spec.configuration.get("threads")
        return asked if isinstance(asked, int) and asked > 0 else max(1, cores() - 1)
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if said.isdecimal() and int(said):
        return int(said)
    return min(allowed_cores(), psutil.cpu_count(logical=False) or allowed_cores())
