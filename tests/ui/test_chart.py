from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.style import Style

from tests.examples import examples
from tui_trainer.history.series import MemorySeries
from tui_trainer.protocol.schema import Column, Table
from tui_trainer.ui import theme
from tui_trainer.ui.glyphs import ASCII, UNICODE, to_ascii
from tui_trainer.ui.widgets import braille
from tui_trainer.ui.widgets.axes import AXIS_WIDTH, Scale, fit_scale, step_window, value_labels
from tui_trainer.ui.widgets.braille import sparklines
from tui_trainer.ui.widgets.chart import Chart
from tui_trainer.ui.widgets.chart_layers import (
    AxisMarks,
    Band,
    ChartMarker,
    Line,
    Points,
    Threshold,
    smooth,
)

PALETTE = theme.palette(theme.DARK.to_color_system().generate())
STYLE = Style(color="red")
LIMIT = float(np.float32(1e30))
finite = st.floats(-LIMIT, LIMIT, width=32)


def text_of(rows):
    return ["".join(segment.text for segment in row) for row in rows]


def dots_of(text, width, height):
    """The dots of lines of braille characters."""
    grid = braille.blank_dots(width, height)
    for y, line in enumerate(text.split("\n")):
        codes = np.array([ord(character) - 0x2800 for character in line])
        codes = np.where((codes >= 0) & (codes < 256), codes, 0)
        cells = braille._PATTERN_DOTS[codes]
        grid[4 * y : 4 * y + 4, : 2 * len(codes)] = cells.transpose(1, 0, 2).reshape(4, -1)
    return grid


def plotted(rows):
    """The dots of the plot itself."""
    lines = [line[AXIS_WIDTH:] for line in text_of(rows)[:-1]]
    return dots_of("\n".join(lines), max(map(len, lines)), len(lines))


@given(
    values=hnp.arrays(np.float32, st.integers(1, 700), elements=finite),
    width=st.integers(AXIS_WIDTH + 4, 120),
    height=st.integers(3, 30),
)
@settings(max_examples=examples(100))
def test_the_extremes_of_every_drawn_column_are_those_of_the_raw_data(values, width, height):
    history = MemorySeries(Table(0, "step", (Column("loss"),)))
    for step, value in enumerate(values, 1):
        history.append(step, np.array([value], np.float32))
    chart = Chart()
    steps = step_window(len(values), None)
    buckets = 2 * chart.plot_width(width)
    seen = history.window([0], *steps, buckets)
    rows = chart.rows(width, height, steps, [Band.from_window(seen, 0, STYLE)], PALETTE, UNICODE)
    grid = plotted(rows)
    scale = chart.scale
    assert scale is not None
    below, above = (any(each.above is side for each in chart.hidden) for side in (False, True))
    assert below or scale.low <= values.min()
    assert above or values.max() <= scale.high
    for outliers in chart.hidden:  # marked, and their extreme is written in the chart
        assert outliers.extreme == (values.max() if outliers.above else values.min())
    if chart.hidden:
        return
    for column in np.flatnonzero(seen.filled):
        inside = values[seen.edges[column] - 1 : seen.edges[column + 1] - 1]
        expected = scale.dot_rows(np.array([inside.max(), inside.min()], np.float32), len(grid))
        set_rows = np.flatnonzero(grid[:, column])
        assert set_rows[0] <= round(expected[0]) <= set_rows[-1]
        assert set_rows[0] <= round(expected[1]) <= set_rows[-1]


def test_one_spike_in_ten_thousand_steps_is_marked_with_its_height():
    history = MemorySeries(Table(0, "step", (Column("loss"),)))
    for step in range(1, 10_001):
        history.append(step, np.array([100.0 if step == 4567 else 1.0], np.float32))
    chart = Chart()
    seen = history.window([0], 1, 10_001, 2 * chart.plot_width(80))
    layers = [Band.from_window(seen, 0, STYLE)]
    rows = text_of(chart.rows(80, 12, (1, 10_001), layers, PALETTE, UNICODE))
    assert rows[0].count(UNICODE.ascending) == 2  # in its column, and before the text
    assert "▲ 100 near step 4,5" in rows[0]
    logarithmic = Chart(log=True)
    grid = plotted(logarithmic.rows(80, 12, (1, 10_001), layers, PALETTE, UNICODE))
    top = round(logarithmic.scale.dot_rows(np.array([100.0], np.float32), len(grid))[0])
    assert grid[top].sum() == 1


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0],
        [0.0, 0.0],
        [math.nan, math.nan],
        [1.0, math.nan, math.inf, -math.inf, 2.0],
        [1e-30, 1e30],
        [-3e38, 3e38],
        [1e-45, 1e-44],
        [5.0] * 40,
        [-1.0, -2.0],
    ],
)
def test_every_value_a_float_can_have_is_drawn_in_the_given_size(values, log):
    numbers = np.full(2 * Chart().plot_width(60), np.nan, np.float32)
    numbers[: len(values)] = values
    finite_only = np.where(np.isfinite(numbers), numbers, np.nan)
    bad = ~np.isfinite(numbers)
    bad[len(values) :] = False
    layers = [
        Band(STYLE, finite_only, finite_only, bad),
        Line(STYLE, finite_only),
        Points(STYLE, np.arange(len(numbers)), finite_only, "o"),
        Threshold(STYLE, 1.0),
        AxisMarks(STYLE, np.arange(len(values)), "|"),
    ]
    lines = text_of(Chart(log=log).rows(60, 10, (1, 41), layers, PALETTE, UNICODE))
    assert len(lines) == 10
    assert {len(line) for line in lines} == {60}


def test_a_value_that_is_not_finite_is_marked_on_the_axis():
    values = np.linspace(1, 2, 40, dtype=np.float32)
    bad = np.zeros(40, bool)
    bad[20] = True
    rows = Chart().rows(29, 6, (1, 41), [Band(STYLE, values, values, bad)], PALETTE, UNICODE)
    assert text_of(rows)[-1][AXIS_WIDTH + 10] == UNICODE.failed


@given(hnp.arrays(np.float64, st.integers(1, 90), elements=st.floats(0, 39) | st.just(np.nan)))
def test_a_line_has_a_dot_for_every_value_and_no_gap_between_two(rows):
    dots = braille.blank_dots(45, 10)
    rows = np.append(rows, np.full(90 - len(rows), np.nan))
    braille.draw_line(dots, rows)
    for column, row in enumerate(rows):
        drawn = np.flatnonzero(dots[:, column])
        if np.isnan(row):
            assert len(drawn) == 0
            continue
        assert round(row) in drawn
        assert len(drawn) == drawn[-1] - drawn[0] + 1
        if column and not np.isnan(rows[column - 1]):
            before = np.flatnonzero(dots[:, column - 1])
            assert before[0] - 1 <= drawn[-1]
            assert drawn[0] - 1 <= before[-1]


def test_every_value_of_a_smoothed_line_is_drawn():
    values = np.random.default_rng(0).normal(2, 0.3, 400).astype(np.float32)
    history = MemorySeries(Table(0, "step", (Column("loss"),)))
    for step, value in enumerate(values, 1):
        history.append(step, np.array([value], np.float32))
    chart = Chart()
    band = Band.from_window(history.window([0], 1, 401, 2 * chart.plot_width(80)), 0, STYLE)
    line = Line(STYLE, smooth(band.low, band.high))
    grid = plotted(chart.rows(80, 12, (1, 401), [line], PALETTE, UNICODE))
    expected = np.rint(chart.scale.dot_rows(line.values, len(grid))).astype(int)
    assert grid[expected, np.arange(len(expected))].all()


def test_a_geometric_average_is_not_lifted_by_a_value_of_another_magnitude():
    values = np.full(100, 2.0, np.float32)
    values[50] = 1e30
    smoothed = smooth(values, values, geometric=True)
    np.testing.assert_allclose(smoothed[:30], 2.0, rtol=1e-5)
    assert smoothed.max() == smoothed[50]
    assert np.isnan(smooth(np.full(9, np.nan), np.full(9, np.nan), geometric=True)).all()


def test_braille_survives_the_way_to_text_and_back():
    grid = np.random.default_rng(1).random((12, 20)) < 0.4
    codes = braille.pattern_codes(braille.cell_patterns(grid))
    text = "\n".join("".join(map(chr, row)) for row in codes)
    assert (dots_of(text, 10, 3) == grid).all()


def test_ascii_charts_hold_nothing_but_ascii():
    values = np.sin(np.arange(2 * Chart().plot_width(60)) / 7).astype(np.float32)
    layers = [Band(STYLE, values, values), Line(STYLE, values), Threshold(STYLE, 0.5)]
    rows = Chart().rows(60, 12, (1, 101), layers, PALETTE, ASCII)
    assert "".join(text_of(rows)).isascii()
    assert to_ascii("‖W−W₀‖ · ▶ é").isascii()
    assert len(to_ascii("‖W−W₀‖ · ▶ é")) == len("‖W−W₀‖ · ▶ é")


@given(st.integers(0, 10**8), st.sampled_from([None, 200, 1000]))
def test_the_window_holds_the_newest_step_and_moves_in_jumps(step, shown):
    start, stop = step_window(step, shown)
    assert start <= max(step, 1) < stop
    assert (start, stop) == step_window(max(start, stop - 1), shown)
    if shown is not None:
        assert stop - start <= shown


@given(finite, finite, st.booleans())
def test_a_scale_holds_what_it_was_made_for_and_stands_still(a, b, log):
    low, high = min(a, b), max(a, b)
    scale = fit_scale(low, high, log)
    if not log:
        assert scale.low <= low
        assert high <= scale.high
        assert fit_scale(low, high, log, previous=scale) == scale
    assert scale.low < scale.high
    assert all(math.isfinite(tick) for tick in scale.ticks(5))


def test_log_places_decades_evenly():
    places = Scale(1.0, 100.0, log=True).fraction(np.array([1, 10, 100, 0, -1], np.float32))
    assert np.allclose(places[:3], [0, 0.5, 1])
    assert np.isnan(places[3:]).all()


def test_values_with_a_cadence_are_held_between_measurements():
    nan = np.nan
    values = np.array([[nan, 0, nan, nan, 7, nan, nan, nan]], np.float32)
    bad = np.array([[0, 0, 0, 0, 0, 0, 1, 0]], bool)
    assert sparklines(values, bad, hold=True) == [" ▁▁▁██! "]
    assert sparklines(values, bad) == [" ▁  █ ! "]


def test_sparklines_show_the_range_the_gaps_and_what_is_not_finite():
    values = np.array([[0, 1, 2, 7, np.nan, 3]], np.float32)
    bad = np.array([[False] * 4 + [True, False]])
    assert sparklines(values, bad) == ["▁▂▃█!▄"]
    assert sparklines(values[:, :5]) == ["▁▂▃█ "]
    assert sparklines(np.full((1, 4), 2.0, np.float32)) == ["▁▁▁▁"]
    assert sparklines(np.empty((2, 0), np.float32)) == ["", ""]
    (extreme,) = sparklines(np.array([[-3e38, 0, 3e38]], np.float32))
    assert (extreme[0], extreme[-1]) == ("▁", "█")


@given(
    low=st.floats(-1e6, 1e6),
    size=st.floats(1e-3, 1e6),
    rows=st.integers(2, 40),
    log=st.booleans(),
)
def test_no_label_of_an_axis_is_missing_between_two_others(low, size, rows, log):
    low = max(abs(low), 1e-3) if log else low
    scale = fit_scale(low, low + size, log)
    ticks = scale.ticks(rows)
    labels = value_labels(scale, rows)
    assert len(labels) == len(ticks) >= 2  # every tick has a row of its own
    if rows > 2:
        assert min(abs(a - b) for a, b in pairwise(labels)) >= 2
    if not log and ticks != [scale.low, scale.high]:
        assert np.ptp(np.diff(ticks)) < 1e-6 * np.diff(ticks).mean()


def test_a_log_axis_has_labels_within_a_decade():
    labels = value_labels(Scale(0.3, 30.0, log=True), 20)
    assert list(labels.values()) == ["0.3", "1", "3", "10", "30"]
    assert "1e-10" in value_labels(Scale(1e-30, 1e30, log=True), 20).values()
    assert "1e5" in value_labels(Scale(1.0, 1e6, log=True), 20).values()


def chart_of(values, **options):
    values = np.asarray(values, np.float32)
    chart = Chart(**options)
    layers = [Band(PALETTE.loss, values, values)]
    rows = chart.rows(69, 12, (1, 1001), layers, PALETTE, UNICODE)
    return chart, ["".join(segment.text for segment in row) for row in rows]


def calm(columns=120):
    return 1 + 0.1 * np.sin(np.arange(columns))


def test_one_outlier_does_not_flatten_a_linear_chart():
    values = calm()
    values[40] = 153
    chart, rows = chart_of(values)
    assert chart.scale.high < 2
    assert "▲ 153" in rows[0]
    assert "step 334" in rows[0]
    logarithmic, rows = chart_of(values, log=True)
    assert logarithmic.scale.high > 150
    assert "▲" not in "".join(rows)


def test_an_outlier_below_is_marked_below():
    values = calm()
    values[40] = -153
    chart, rows = chart_of(values)
    assert chart.scale.low > 0
    assert "▼ -153" in rows[-2]


def test_the_newest_values_are_never_hidden():
    values = calm()
    values[-1] = 153
    chart, rows = chart_of(values)
    assert chart.scale.high >= 153
    assert "▲" not in "".join(rows)


def test_a_falling_loss_is_shown_whole():
    chart, rows = chart_of(5 * np.exp(-np.arange(120) / 30) + 1)
    assert chart.scale.high >= 6
    assert "▲" not in "".join(rows)


def test_a_moment_is_a_line_through_the_free_cells():
    values = np.full(120, 1, np.float32)
    layers = [Band(PALETTE.loss, values, values), ChartMarker(PALETTE.error, 501)]
    rows = Chart().rows(69, 12, (1, 1001), layers, PALETTE, UNICODE)
    texts = ["".join(segment.text for segment in row) for row in rows[:-1]]
    assert sum("┆" in text for text in texts) >= len(texts) - 2


def test_a_loss_that_explodes_makes_the_axis_logarithmic_by_itself():
    values = np.concatenate([calm(100), np.geomspace(2, 1e9, 20)])
    chart, _ = chart_of(values)
    assert chart.drawn_log
    assert not chart.log
    assert not chart.hidden
    layers = [Band(PALETTE.loss, values.astype(np.float32), values.astype(np.float32))]
    for log in (False, True, False):
        chart.toggle_log()  # always to what is not drawn now
        chart.rows(69, 12, (1, 1001), layers, PALETTE, UNICODE)
        assert chart.drawn_log is log
    chart, _ = chart_of(np.concatenate([values, -values[:1]])[1:])
    assert not chart.drawn_log
