"""What is said of the device that a run trains on."""

from __future__ import annotations

import os

import pytest

from tui_trainer.run.devices import no_core_left


@pytest.mark.parametrize(
    ("threads", "cores", "said"),
    [(4, 4, True), (8, 4, True), (3, 4, False), (1, 4, False), (1, 1, False), (4, 1, True)],
)
def test_threads_on_every_core_are_spoken_of(monkeypatch, threads, cores, said):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    text = no_core_left(threads)
    assert bool(text) is said
    if said:
        assert f"OMP_NUM_THREADS={max(1, cores - 1)}" in text
