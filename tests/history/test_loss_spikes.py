from __future__ import annotations

import numpy as np
import pytest

from tui_trainer.history import loss_spikes
from tui_trainer.history.loss_spikes import (
    MEDIAN_BINS,
    MIN_BINS,
    THRESHOLD,
    find_spikes,
    robust_z_scores,
)
from tui_trainer.history.series import MemorySeries
from tui_trainer.protocol.schema import Column, Table


def series(values):
    held = MemorySeries(Table(0, "step", (Column("loss"),)))
    for step, value in enumerate(values, 1):
        held.append(step, np.float32([value]))
    return held


def naive(values):
    """The definition, one loss at a time."""
    found = []
    for i, value in enumerate(values):
        before = values[max(0, i - MEDIAN_BINS) : i]
        if len(before) < MIN_BINS:
            found.append(0.0)
            continue
        m = np.median(before)
        s = max(1.4826 * np.median(np.abs(before - m)), 1e-3 * abs(m), 1e-300)
        found.append((value - m) / s)
    return np.array(found)


@pytest.mark.parametrize("seed", range(5))
def test_scores_follow_the_definition(seed):
    values = np.random.default_rng(seed).standard_normal(300).cumsum()
    np.testing.assert_allclose(robust_z_scores(values, values), naive(values), rtol=1e-9)


def test_the_worst_comes_first():
    random = np.random.default_rng(2)
    losses = 3 / (1 + np.arange(1500) / 100) + 0.01 * random.standard_normal(1500)
    losses[400] += 0.5
    losses[900] += 2.0
    losses[901] += 1.0
    losses[1200] = np.nan
    losses[1201] = np.inf
    found = find_spikes(series(losses), "loss")
    assert [spike.step for spike in found[:2]] == [901, 401]
    assert found[0].loss == pytest.approx(losses[900])
    assert all(spike.deviations >= THRESHOLD for spike in found)
    assert len(find_spikes(series(losses), "loss", 1)) == 1


def test_the_exact_step_is_found_in_a_long_run(monkeypatch):
    monkeypatch.setattr(loss_spikes, "BINS", 64)
    losses = 1 + 0.01 * np.random.default_rng(3).standard_normal(5000)
    losses[3141] = 4.0
    worst = find_spikes(series(losses), "loss")[0]
    assert (worst.step, worst.loss) == (3142, 4.0)


@pytest.mark.parametrize("values", [[], [1.0], [2.0] * 500, [np.nan] * 50, list(range(300, 0, -1))])
def test_series_without_spikes(values):
    assert find_spikes(series(values), "loss") == []
