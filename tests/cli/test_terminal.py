"""Screen or lines: by the options, and by the terminal's abilities."""

from __future__ import annotations

import sys

import pytest

from tui_trainer.cli.options import RunOptions
from tui_trainer.cli.terminal import screen_for, why_no_screen


class Stream:
    def __init__(self, terminal: bool) -> None:
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    def arrange(stdin: bool, stdout: bool, term: str | None) -> None:
        monkeypatch.setattr(sys, "stdin", Stream(stdin))
        monkeypatch.setattr(sys, "stdout", Stream(stdout))
        if term is None:
            monkeypatch.delenv("TERM", raising=False)
        else:
            monkeypatch.setenv("TERM", term)

    return arrange


@pytest.mark.parametrize(
    ("stdin", "stdout", "term", "kind", "noted"),
    [
        (True, True, "xterm-256color", "screen", False),
        (True, True, "linux", "screen", False),
        (True, True, "dumb", "plain", True),
        (True, True, None, "plain", True),
        (False, True, "xterm", "plain", True),
        (True, False, "xterm", "plain", False),
        (False, False, "xterm", "plain", False),
    ],
)
def test_the_abilities_of_the_terminal(on, stdin, stdout, term, kind, noted) -> None:
    on(stdin, stdout, term)
    showing = screen_for(RunOptions())
    assert (showing.kind, bool(showing.note)) == (kind, noted)
    assert bool(why_no_screen()) == (kind != "screen")


def test_the_options_take_precedence(on) -> None:
    on(True, True, "xterm")
    assert screen_for(RunOptions(json=True)).kind == "json"
    assert screen_for(RunOptions(plain=True)).kind == "plain"


def test_no_streams_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert screen_for(RunOptions()).kind == "plain"
