"""Ranges of healthy values, in words."""

from __future__ import annotations

import pytest

from tui_trainer.history.healthy_ranges import UPDATE_RATIO, HealthyRange


def test_the_range_in_words() -> None:
    assert UPDATE_RATIO.words == "healthy 1e-4 to 0.1"
    assert UPDATE_RATIO.describe(0.31) == "above the healthy 1e-4 to 0.1"
    assert UPDATE_RATIO.describe(2e-6) == "below the healthy 1e-4 to 0.1"
    assert UPDATE_RATIO.describe(1e-3) == ""
    assert HealthyRange(high=50).words == "healthy up to 50"
    assert HealthyRange(low=0.5).words == "healthy from 0.5"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_judged(value: float) -> None:
    assert UPDATE_RATIO.holds(value)
