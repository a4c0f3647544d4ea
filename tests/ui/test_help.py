from __future__ import annotations

import re
from pathlib import Path

import pytest
from textual.binding import Binding

from tests.ui.fake import fake_empty, fake_gpt
from tests.ui.screens import SIZES, app_on, settle, text_of
from tui_trainer.learn.page import help_texts
from tui_trainer.learn.scalar.graph import ScalarGraph
from tui_trainer.learn.scalar.parser import EXAMPLES
from tui_trainer.protocol import PHASES
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.command_palette import ActionProvider
from tui_trainer.ui.compare_app import CompareApp
from tui_trainer.ui.glyphs import UNICODE
from tui_trainer.ui.graph_app import GraphApp
from tui_trainer.ui.replay_app import ReplayApp
from tui_trainer.ui.screens import FURTHER_SCREENS, SCREENS, help
from tui_trainer.ui.screens.base import CONTROL_ACTIONS
from tui_trainer.ui.screens.help import IN_REPLAY, THIS_SCREEN, help_blocks, key_groups


def screens() -> list[type]:
    return [entry.load() for entry in (*SCREENS, *FURTHER_SCREENS)]


def test_every_binding_of_every_screen_is_in_the_help() -> None:
    app = app_on("help", None)
    listed = {key.action for group in key_groups(app) for key in group.keys}
    for screen in screens():
        for binding in Binding.make_bindings(screen.BINDINGS):  # type: ignore[attr-defined]
            assert binding.action in listed
    for binding in Binding.make_bindings(type(app).BINDINGS):
        assert binding.action in listed


def test_every_binding_has_an_id_and_a_tooltip() -> None:
    for screen in screens():
        for binding in Binding.make_bindings(screen.BINDINGS):  # type: ignore[attr-defined]
            assert binding.id, binding
            assert binding.tooltip, binding


def test_no_screen_binds_a_key_twice() -> None:
    for screen in screens():
        keys = [b.key for b in Binding.make_bindings(screen.BINDINGS)]  # type: ignore[attr-defined]
        assert len(keys) == len(set(keys)), screen


def test_every_phase_is_explained() -> None:
    assert tuple(name for name, _ in help.PHASES) == PHASES


@pytest.mark.parametrize(
    ("ascii", "signs"),
    [(False, ("◆", "▴", "╵", "×", "▲", "–")), (True, ("o", "^", "'", "x", "^", "-"))],
)
async def test_signs_are_those_that_are_drawn(ascii: bool, signs: tuple[str, ...]) -> None:
    app = app_on("help", fake_gpt(), ascii=ascii)
    async with app.run_test(size=(120, 60)) as pilot:
        await settle(pilot)
        await pilot.press("slash", *"signs", "enter")
        await settle(pilot)
        shown = [line.split("  ")[0].strip() for line in text_of(app).splitlines()]
        assert [sign for sign in shown if sign in signs] == list(signs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
async def test_all_of_it_can_be_read(size: tuple[int, int]) -> None:
    app = app_on("help", fake_gpt())
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        pages = [text_of(app)]
        while pages[-1] not in pages[:-1]:
            await pilot.press("pagedown")
            await settle(pilot)
            pages.append(text_of(app))
        seen = "".join(pages)
        for word in ("Controlling the run", "zero_grad", "update ratio", "effective rank", "n/a"):
            assert word in seen


async def test_filter_and_back() -> None:
    app = app_on("help", fake_empty())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("slash", *"wrong", "enter")
        await settle(pilot)
        assert "wrong images first" in text_of(app)
        assert "Controlling the run" not in text_of(app)
        await pilot.press("escape")
        await settle(pilot)
        assert "Controlling the run" in text_of(app)
        await pilot.press("escape")
        await settle(pilot)
        assert app.current_mode == "dashboard"


async def test_the_palette_has_every_action_with_its_help() -> None:
    app = app_on("parameters", fake_gpt())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        found = list(ActionProvider(app.screen).commands())
        helps = " ".join(help for _, help, _ in found)
        for binding in Binding.make_bindings(type(app.screen).BINDINGS):
            if app.screen.check_action(binding.action.split("(")[0], ()):
                assert str(binding.tooltip) in helps
        names = [name for name, _, _ in found]
        assert "Show attention" in names
        assert "Write a checkpoint" in names
        assert all(help for _, help, _ in found)


async def test_an_action_of_the_palette_acts() -> None:
    session = fake_gpt()
    app = app_on("log", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        commands = {name: run for name, _, run in ActionProvider(app.screen).commands()}
        commands["Stop the run"]()
        await settle(pilot)
        assert session.status.state == "stopped"
        after = [name for name, _, _ in ActionProvider(app.screen).commands()]
        assert "Stop the run" not in after


def test_no_key_of_a_screen_shares_its_action_with_one_that_controls_the_run():
    """Such a key would be dimmed while no run could obey."""
    for entry in SCREENS:
        for binding in entry.load().BINDINGS:
            if isinstance(binding, Binding) and not (binding.id or "").startswith("run."):
                assert binding.action not in CONTROL_ACTIONS, (entry.mode, binding.key)


# ---------------------------------------------------------------- in French


def apps() -> list[TuiTrainerApp]:
    graph = ScalarGraph.of(EXAMPLES[0].text, EXAMPLES[0].values)
    # An app is not run for its bindings.
    return [TuiTrainerApp(), GraphApp(graph), CompareApp([])]


def test_every_text_of_the_help_is_there_in_french() -> None:
    french = help_texts("fr")
    shown = set()
    for app in apps():
        for mode in ("learn", "dashboard"):
            for block in help_blocks(key_groups(app, mode), UNICODE):
                shown |= {block.title.removeprefix(f"{THIS_SCREEN}: ")}
                shown |= {text for _, text in block.entries}
    shown |= set(IN_REPLAY.values())
    shown |= {
        binding.tooltip for binding in Binding.make_bindings(ReplayApp.BINDINGS) if binding.tooltip
    }
    missing = sorted(shown - set(french))
    assert not missing, f"add these to pages/fr/help.toml: {missing}"
    for english, text in french.items():
        assert text
        assert "'" not in text, "an apostrophe is ’"
        assert not re.search(r"\w [:;?!](\s|$)", text), (english, "a no-break space")


async def test_the_help_is_in_the_language_of_the_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "fr_FR.UTF-8")
    app = app_on("dashboard", fake_gpt(30))
    async with app.run_test(size=(200, 60)) as pilot:
        await settle(pilot)
        await pilot.press("question_mark")
        await settle(pilot)
        text = text_of(app)
        for part in ("En savoir plus", "Cet écran\u00a0: Tableau de bord", "Retour",
                     "Un pas de l’optimiseur, puis pause", "Une ligne plus haut"):  # fmt: skip
            assert part in text, text
        await pilot.press("slash", *"zzz")
        await settle(pilot)
        assert "rien ne contient" in text_of(app)
