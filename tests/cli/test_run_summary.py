from __future__ import annotations

import math

import pytest

from tui_trainer.cli.run_summary import finite, nonfinite_text
from tui_trainer.protocol.absent import Absent, absent


@pytest.mark.parametrize(
    ("value", "number", "text"),
    [
        (None, None, None),
        (0.5, 0.5, None),
        (math.nan, None, "nan"),
        (-math.inf, None, "-inf"),
        (absent(Absent.LOSS_NOT_SEEN), None, None),
    ],
)
def test_only_a_measured_value_is_written_as_not_finite(
    value: float | None, number: float | None, text: str | None
) -> None:
    assert finite(value) == number
    assert nonfinite_text(value) == text
