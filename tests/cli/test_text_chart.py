from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from tests.examples import examples
from tui_trainer.cli.text_chart import TextCurve, text_chart

VALUES = st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=60)


@settings(max_examples=examples(60))
@given(VALUES, st.integers(30, 120), st.integers(5, 20))
def test_any_curve_fits_its_size(values, width, height):
    lines = text_chart([TextCurve(range(1, len(values) + 1), values, values)], width, height)
    assert bool(lines) == any(value is not None for value in values)
    assert len(lines) <= height
    assert all(cell_len(line) <= width for line in lines)


def test_a_spike_within_a_bucket_reaches_its_value():
    steps = range(1, 61)
    low = [1.0] * 60
    high = [1.0] * 60
    high[30] = 9.0
    lines = text_chart([TextCurve(steps, low, high)], 72, 10)
    top = next(line for line in lines if line.lstrip().startswith("9"))
    column = next(i for i, cell in enumerate(top) if "⠀" < cell <= "⣿")
    assert abs(column - 72 / 2) < 6  # in the middle of the chart, on its highest line


def test_nothing_finite_is_no_chart():
    assert text_chart([TextCurve([1, 2], [None, math.nan], [None, math.inf])], 72, 10) == []
    assert text_chart([], 72, 10) == []


def test_each_run_has_its_own_marker():
    curves = [
        TextCurve([1, 50, 100], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], "*"),
        TextCurve([1, 50, 100], [1.0, 1.5, 2.5], [1.0, 1.5, 2.5], "o"),
    ]
    text = "\n".join(text_chart(curves, 60, 10))
    assert "*" in text
    assert "o" in text
    assert "100" in text


def test_an_axis_is_logarithmic_where_one_value_would_flatten_the_others():
    values = [1e5, *(2.0 - 0.01 * step for step in range(99))]
    lines = text_chart([TextCurve(range(1, 101), values, values)], 72, 10)
    assert lines[0 if "log" in lines[0] else 1].lstrip().startswith("log 1e+05")
    middle = [line for line in lines if any("⠀" < cell <= "⣿" for cell in line)]
    assert len(middle) > 2
    rest = TextCurve(range(1, 100), values[1:], values[1:])
    assert "log" not in "".join(text_chart([rest], 72, 10))


def test_an_axis_is_logarithmic_where_one_curve_would_flatten_another():
    healthy = [2.3 - 0.002 * step for step in range(100)]
    diverging = [2.3 + 25.0 * step for step in range(100)]
    lines = text_chart(
        [
            TextCurve(range(1, 101), healthy, healthy, "*"),
            TextCurve(range(1, 101), diverging, diverging, "o"),
        ],
        72,
        10,
    )
    assert "log" in "".join(lines[:2])
    assert "*" in "".join(lines)
