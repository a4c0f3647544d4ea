"""Contrast: text has at least 4.5:1 with its background, marks of charts 3:1, in every theme."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from textual._xterm_parser import XTermParser
from textual.app import App
from textual.color import Color
from textual.events import Key
from textual.theme import BUILTIN_THEMES, Theme

from tests.ui.fake import fake_gpt
from tests.ui.screens import app_on, settle
from tui_trainer.ui import textual_hacks, theme
from tui_trainer.ui.app import TuiTrainerApp

MARKS = ("faint", "loss_raw")
THEMES = {
    each.name: each for each in (*theme.THEMES, *BUILTIN_THEMES.values()) if "ansi" not in each.name
}


def palette_of(each: Theme) -> theme.Palette:
    return theme.palette({**each.to_color_system().generate(), **each.variables})


def color(rich_color: object) -> Color:
    return Color.from_rich_color(rich_color)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", THEMES)
def test_text_and_marks_contrast_with_the_background(name: str) -> None:
    palette = palette_of(THEMES[name])
    under_cursor = color(palette.cursor.bgcolor)
    for field in fields(palette):
        style = getattr(palette, field.name)
        if field.name in ("rule", "cursor") or style.color is None:
            continue
        wanted = 3.0 if field.name in MARKS else 4.5
        found = theme.contrast(color(style.color), color(style.bgcolor))
        assert found >= wanted - 0.01, f"{field.name}: {found:.2f}"
        if field.name not in (*MARKS, "dim", "title", "current"):
            on_cursor = theme.contrast(color(style.color), under_cursor)
            assert on_cursor >= 4.49, f"{field.name} under the cursor: {on_cursor:.2f}"


@pytest.mark.parametrize("each", theme.THEMES, ids=lambda each: each.name)
def test_matrices_and_their_pairs_have_colours_of_their_own(each: Theme) -> None:
    palette = palette_of(each)
    names = ("q", "k", "v", "qk", "qv", "kv", "validation", "error", "warning")
    assert len({getattr(palette, name).color for name in names}) == len(names)


def test_ratio_of_black_on_white() -> None:
    assert theme.contrast(Color(0, 0, 0), Color(255, 255, 255)) == pytest.approx(21)


@pytest.fixture
def no_theme_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TEXTUAL_THEME", "COLORFGBG", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.mark.usefixtures("no_theme_is_set")
def test_the_chosen_theme_is_remembered() -> None:
    assert theme.initial_theme() == {"theme_name": "tui-trainer", "asks_background": True}
    theme.remember_theme("nord")
    assert theme.initial_theme() == {"theme_name": "nord"}
    theme.remember_theme("no-such-theme")
    assert theme.initial_theme()["theme_name"] == "tui-trainer"


@pytest.mark.usefixtures("no_theme_is_set")
def test_the_environment_comes_before_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    theme.remember_theme("nord")
    monkeypatch.setenv("TEXTUAL_THEME", "dracula")
    assert theme.initial_theme() == {"theme_name": "dracula"}


@pytest.mark.usefixtures("no_theme_is_set")
@pytest.mark.parametrize(
    ("value", "name"),
    [("0;15", "tui-trainer-light"), ("15;0", "tui-trainer"), ("0;default;7", "tui-trainer-light")],
)
def test_a_terminal_tells_its_background(
    value: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLORFGBG", value)
    assert theme.initial_theme() == {"theme_name": name}


@pytest.mark.parametrize("cuts", [(), (3,), (9, 20), (24,)])
@pytest.mark.parametrize("end", ["\x07", "\x1b\\"])
def test_the_answer_about_the_background_never_becomes_keys(
    cuts: tuple[int, ...], end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(XTermParser, "feed", XTermParser.feed)
    answers: list[tuple[float, float, float]] = []
    textual_hacks.take_background_replies(answers.append)
    parser = XTermParser()
    text = f"a\x1b]11;rgb:ffff/8000/0000{end}b"
    edges = [0, *cuts, len(text)]
    events = [event for a, b in pairwise(edges) for event in parser.feed(text[a:b])]
    keys = [event.character for event in events if isinstance(event, Key)]
    assert keys == ["a", "b"]
    assert answers == [pytest.approx((1.0, 0.5, 0.0), abs=1e-3)]
    assert theme.is_light(1, 1, 0.9)
    assert not theme.is_light(0.1, 0.1, 0.2)


async def test_a_theme_of_ours_is_used_that_the_environment_has_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Textual reads $TEXTUAL_THEME when it is imported, and does not know the theme then."""
    monkeypatch.setattr(App.__dict__["theme"], "_default", theme.LIGHT.name)
    app = TuiTrainerApp(fake_gpt(30), theme_name=theme.LIGHT.name)
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        assert app.palette.text == palette_of(theme.LIGHT).text


async def test_a_screen_behind_another_takes_over_a_new_theme() -> None:
    app = app_on("dashboard", fake_gpt(30))
    async with app.run_test(size=(100, 30)) as pilot:
        await settle(pilot)
        dark = app.screen.styles.background
        app.action_go("log")
        await settle(pilot)
        app.theme = theme.LIGHT.name
        await settle(pilot)
        light = app.screen.styles.background
        app.action_go("dashboard")
        await settle(pilot)
        assert app.screen.styles.background == light != dark
        assert app.screen.query_one("#body").background_colors[1] == light


async def test_a_screen_has_the_classes_of_its_size_before_and_after_a_resize() -> None:
    """Those that Textual sets, which are given before a screen is mounted, to style it once."""
    app = app_on("dashboard", fake_gpt(30))
    of_sizes = {"-narrow", "-medium", "-wide", "-short", "-tall", "-very-tall", "-folded"}
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        assert app.screen.classes & of_sizes == {"-medium", "-tall"}
        await pilot.resize_terminal(80, 24)
        await settle(pilot)
        assert app.screen.classes & of_sizes == {"-narrow", "-short", "-folded"}
