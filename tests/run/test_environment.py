"""OpenMP's spinning threads, and the warning when PyTorch takes every core."""

from __future__ import annotations

import os

import pytest

from tui_trainer.config.run_spec import RunSpec
from tui_trainer.run import environment
from tui_trainer.run.environment import SPIN_COUNT, limit_openmp_spinning


class Busy:
    def __init__(self, cores):
        self._cores = cores

    def cores(self):
        return self._cores


@pytest.fixture
def settled(monkeypatch):
    """OpenMP's spin count on four cores; None where it is not set."""
    variables = {}
    monkeypatch.setattr(environment.os, "environ", variables)
    monkeypatch.setattr(environment, "allowed_cores", lambda: 4)
    monkeypatch.setattr(environment.psutil, "cpu_count", lambda logical: 4)

    def settle(spec, others, quota=float("inf"), **chosen):
        monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
        monkeypatch.setattr(environment, "usable_cores", lambda: int(min(4, quota)))
        variables.clear()
        variables.update(chosen)
        limit_openmp_spinning(spec, Busy(others))
        return variables.get("GOMP_SPINCOUNT")

    return settle


def script(**changes):
    return RunSpec(name="a", directory="/a", task="script", script="a.py", **changes)


def gpt(threads):
    return RunSpec(name="a", directory="/a", task="gpt", configuration={"threads": threads})


def test_on_an_idle_machine_nothing_is_set(settled):
    assert settled(script(), 0.1) is None
    assert settled(gpt(0), 0.1) is None
    assert settled(gpt(4), 0.1) is None


def test_beside_others_that_need_the_cores(settled):
    assert settled(script(), 1.0) == SPIN_COUNT
    assert settled(gpt(4), 1.0) == SPIN_COUNT
    assert settled(gpt(0), 2.0) == SPIN_COUNT


def test_where_a_core_is_left_for_them(settled):
    assert settled(gpt(0), 1.0) is None
    assert settled(gpt(2), 2.0) is None
    assert settled(script(), 2.0, OMP_NUM_THREADS="2") is None
    assert settled(script(), 2.0, OMP_NUM_THREADS="2,1") is None
    assert settled(script(), 2.0, OMP_NUM_THREADS="nonsense") == SPIN_COUNT


def test_a_quota_below_the_threads(settled):
    """PyTorch ignores quotas: a script has as many threads as there are cores."""
    assert settled(script(), 0.0, quota=2.0) == SPIN_COUNT
    assert settled(script(), 0.0, quota=2.0, OMP_NUM_THREADS="2") is None
    assert settled(gpt(0), 0.0, quota=2.0) is None
    assert settled(gpt(1), 2.5, quota=2.0) is None  # others have other cores


def test_nothing_that_is_asked_for_is_too_odd(settled):
    assert settled(gpt("auto"), 0.1) is None
    assert settled(script(), 0.1, OMP_NUM_THREADS="²") is None


def test_the_users_own_choice_stands(settled):
    assert settled(script(), 3.0, OMP_WAIT_POLICY="active") is None
    assert settled(script(), 3.0, GOMP_SPINCOUNT="7") == "7"


@pytest.mark.parametrize(
    ("threads", "cores", "warned"),
    [(4, 4, True), (8, 4, True), (3, 4, False), (1, 4, False), (1, 1, False), (4, 1, True)],
)
def test_threads_on_every_core_are_warned_of(monkeypatch, threads, cores, warned):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    text = environment.busy_cores_warning(threads)
    assert bool(text) is warned
    if warned:
        assert f"OMP_NUM_THREADS={max(1, cores - 1)}" in text
