"""What the pages propose to try exists: commands, their options, and demos."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tui_trainer.cli.main import run
from tui_trainer.learn.catalog import PAGES
from tui_trainer.learn.demos import DEMOS
from tui_trainer.learn.page import LANGUAGES, command_to_try, load_page


@cache
def proposed(name: str, language: str) -> tuple[str, ...]:
    text = " ".join(load_page(name, language).to_try.split())
    return tuple(re.findall(r"`tui-trainer ([^`]*)`", text))


@pytest.mark.parametrize("name", PAGES)
def test_each_language_proposes_the_same(name: str) -> None:
    first, *others = [proposed(name, language) for language in LANGUAGES]
    assert first
    assert command_to_try(load_page(name, "en")), "a learner has no run yet"
    assert all(other == first for other in others)


def test_the_commands_and_their_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[str, str] = {}
    for command in sorted({each for name in PAGES for each in proposed(name, "en")}):
        first = command.split()[0]
        if first not in helps:
            assert run([first, "--help"]) == 0, command
            helps[first] = capsys.readouterr().out
        for flag in re.findall(r"--[a-z-]+", command):
            assert flag in helps[first], command
        if command.startswith("demo "):
            assert command.split()[1] in {demo.name for demo in DEMOS}
