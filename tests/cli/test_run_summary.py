from __future__ import annotations

import math

import numpy as np
import pytest

from tui_trainer.cli.run_summary import BARS, _curve, _sparkline, finite, nonfinite_text
from tui_trainer.history.series import MemorySeries
from tui_trainer.protocol import schema
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


@pytest.mark.parametrize(("count", "drawn"), [(30, "▁▁!"), (600, "▁" * 42 + "!" * 18)])
def test_only_what_is_not_finite_is_drawn_as_such(count: int, drawn: str) -> None:
    """The norm of a script that does not clip is not measured at every step."""
    series = MemorySeries(schema.Table(0, schema.STEP, (schema.Column("grad_norm_preclip"),)))
    for step in range(1, count + 1):
        value = 2.0 if step < 0.7 * count else math.nan
        measured = step % 10 == 1
        row = np.array([value if measured else absent(Absent.NOT_MEASURED)], np.float32)
        series.append(step, row)
    curve = _curve(series, "grad_norm_preclip", count)
    assert len(curve.steps) == len(drawn)
    assert _sparkline(curve, BARS) == drawn
