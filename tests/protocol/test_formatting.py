from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui_trainer.protocol import formatting as f


def test_a_number_in_text_keeps_its_sign_and_decimals():
    assert f.signed(0.5, 0) == "+0.5000"
    assert f.signed(-0.25, 0, 2) == "-0.25"


@given(st.floats(), st.integers(5, 12), st.integers(2, 5))
def test_a_number_is_always_exactly_as_wide_as_its_column(value, width, digits):
    assert len(f.number(value, width, digits)) == width
    assert len(f.loss(value, max(width, 7))) == max(width, 7)
    assert len(f.signed(value, 7, 3)) == 7
    assert len(f.percent(value, 6)) == 6
    assert len(f.count(value, 7)) == 7
    assert len(f.bytes_(value, 9)) == 9
    assert len(f.milliseconds(value, 9)) == 9
    assert len(f.duration(value, 9)) == 9
    assert len(f.scientific(value, 9)) == 9


@given(st.floats(1e-38, 1e38, allow_subnormal=False) | st.floats(1e-4, 1e4))
def test_a_number_that_fits_is_exact(value):
    """To the third decimal where the column keeps its decimals in line, which is down to 0.001."""
    shown = f.number(value, 10, 4)
    assert float(shown) == pytest.approx(value, rel=6e-3, abs=5e-4 if value >= 1e-3 else 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.42034, "1.420"), (0.0123, "0.012"), (1234.5, "1234"), (1e-30, "1.00e-30"), (0, "0.000"),
     (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (None, "–")],
)  # fmt: skip
def test_numbers_as_people_write_them(value, expected):
    assert f.number(value).strip() == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00"), (185, "3:05"), (7384, "2:03:04"), (273_900, "3d 04:05"), (None, "–"), (-1, "–")],
)
def test_durations(seconds, expected):
    assert f.duration(seconds).strip() == expected


@pytest.mark.parametrize("show", [f.percent, f.count, f.bytes_, f.duration, f.milliseconds])
def test_a_value_that_is_not_finite_differs_from_one_that_was_not_measured(show):
    values = (None, math.nan, math.inf, -math.inf)
    assert [show(value).strip() for value in values] == ["–", "nan", "inf", "-inf"]


def test_a_small_number_is_not_written_as_zero():
    assert [f.number(0.0012, 6, digits) for digits in (4, 3, 2)] == [" 0.001", "1.2e-3", "  1e-3"]
    assert f.number(0.012, 6, 3) == "  0.01"
    assert f.number(0.0012, 4) == "1e-3"


def test_the_weight_of_a_numbered_module_keeps_its_name():
    names = ("head.weight", "head.bias", "layers.0.weight", "0.weight", "update ratio of 2.weight")
    assert [f.parameter_name(name) for name in names] == ["head", *names[1:]]


def test_units():
    assert (f.percent(0.125).strip(), f.percent(0.125, 0)) == ("12.5%", "12.5 %")
    assert [f.percent(share, 0, 2) for share in (0.01, 0.0204, 0, 1)] == [
        "1 %", "2.04 %", "0 %", "100 %"
    ]  # fmt: skip
    assert f.percent(0.1, 0, 0) == "10 %"
    assert f.count(154_400).strip() == "154.4k"
    assert f.count(494_149_000).strip() == "494.1M"
    assert f.bytes_(611 * 2**20).strip() == "611.0 MB"
    assert f.milliseconds(46.12).strip() == "46.1 ms"
    assert f.milliseconds(1530).strip() == "1.53 s"
    assert [f.counted(n, "step") for n in (0, 1, 1240)] == ["0 steps", "1 step", "1,240 steps"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "yes"),
        (494_149, "494,149"),
        (3e-4, "0.0003"),
        ("", "–"),
        (None, "–"),
        ("a\n b", "a b"),
    ],
)
def test_settings(value, expected):
    assert f.scalar(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(42, "42 s"), (185, "3 min"), (7500, "2 h 05"), (400_000, "5 d"), (None, "–")],
)
def test_ages(seconds, expected):
    assert f.rough_duration(seconds) == expected
