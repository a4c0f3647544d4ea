"""Changes of settings as they are typed."""

from __future__ import annotations

import math

import pytest

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.live_settings import parse_change, parse_changes


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("lr=3e-4", "lr=0.0003"),
        (" learning-rate = .1 ", "lr=0.1"),
        ("lr[2]=1", "lr[2]=1"),
        ("betas=(0.9, 0.95)", "betas=0.9,0.95"),
        ("max_norm=0.5", "clip=0.5"),
        ("clip=OFF", "clip=off"),
        ("batch_size=64", "batch_size=64"),
        ("freeze=blocks.[01].*=", "freeze=blocks.[01].*="),
        ("lr=0.123456789", "lr=0.123456789"),
    ],
)
def test_a_change_is_understood(typed, text):
    assert parse_change(typed).text == text


@pytest.mark.parametrize(
    ("typed", "reason", "hint"),
    [
        ("lr", "'lr' is not a change of a setting", "lr=3e-4"),
        ("rl=1", "there is no setting 'rl'", "lr"),
        ("weight_deacy=1", "there is no setting 'weight_deacy'", "did you mean weight_decay?"),
        ("lr=", "lr needs a value", "lr=0.01"),
        ("lr=fast", "lr cannot be 'fast'", "expected a number, at least 0"),
        ("lr=nan", "lr cannot be 'nan'", "at least 0"),
        ("lr=inf", "lr cannot be 'inf'", "at least 0"),
        ("lr=-1", "lr cannot be '-1'", "at least 0"),
        ("betas=0.9", "betas needs two numbers, not '0.9'", "betas=0.9,0.95"),
        ("betas=0.9,1", "betas cannot be '1'", "less than 1"),
        ("clip=0", "clip cannot be '0'", "greater than 0, or off"),
        ("batch_size=2.5", "batch_size cannot be '2.5'", "a whole number, at least 1"),
        ("clip[0]=1", "clip belongs to no parameter group", "leave out [0]"),
        ("lr[x]=1", "'lr[x]' is not the name of a setting", "lr[1]=3e-4"),
    ],
)
def test_what_cannot_be_understood_is_one_line_with_a_hint(typed, reason, hint):
    with pytest.raises(ConfigurationError) as caught:
        parse_change(typed)
    assert reason in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_a_setting_is_given_once():
    with pytest.raises(ConfigurationError, match="lr is given twice"):
        parse_changes(["lr=1", "lr=2"])
    assert len(parse_changes(["lr[0]=1", "lr[1]=2", "freeze=a", "freeze=b"])) == 4
    assert math.isinf(parse_changes(["clip=none"])[0].value)
