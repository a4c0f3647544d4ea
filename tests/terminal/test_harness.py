"""The harness itself: it must detect a terminal that was not restored."""

from __future__ import annotations

import sys

import pytest

from tests.terminal.harness import Terminal


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_draws_waits_and_reports_the_exit_status() -> None:
    code = "print('ready'); line = input(); print('got', line); raise SystemExit(7)"
    with Terminal(python(code), columns=40, rows=10) as terminal:
        terminal.wait_for("ready")
        terminal.press("a", "b", "enter")
        terminal.wait_for("got ab")
        assert terminal.wait_for_exit() == 7
        terminal.assert_restored()


@pytest.mark.parametrize(
    "left",
    [r"'\x1b[?1049h'", r"'\x1b[?25l'", r"'\x1b[?1003;1006h'"],
)
def test_sees_a_mode_that_was_left_on(left: str) -> None:
    with Terminal(python(f"print({left})"), columns=40, rows=10) as terminal:
        terminal.wait_for_exit()
        with pytest.raises(AssertionError):
            terminal.assert_restored()


def test_sees_raw_mode_that_was_left_on() -> None:
    with Terminal(python("import tty; tty.setraw(0)"), columns=40, rows=10) as terminal:
        terminal.wait_for_exit()
        with pytest.raises(AssertionError, match="settings"):
            terminal.assert_restored()


def test_what_never_comes_is_an_error_that_shows_the_screen_and_the_stacks() -> None:
    with Terminal(python("print('only this'); input()"), columns=40, rows=10) as terminal:
        terminal.wait_for("only this")
        with pytest.raises(AssertionError, match=r"(?s)only this.*File \"<string>\", line 1"):
            terminal.wait_for("something else", timeout=0.2)
