"""How the screens look, at each of the three sizes, in the light theme, in grey and in ASCII.

After a wanted change: `pytest tests/ui/test_screen_snapshots.py --snapshot-update`, and look.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion
from textual.pilot import Pilot

from tests.ui.fake import FakeSession, fake_empty, fake_gpt, fake_non_finite, fake_vit
from tests.ui.pictures import Pictures
from tests.ui.screens import SIZES, settle
from tui_trainer.runs.launch import LaunchRequest
from tui_trainer.tasks.gpt import task as gpt
from tui_trainer.tasks.vit import task as vit
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.screens.start import Launcher

Compare = Callable[..., bool]


pytestmark = pytest.mark.usefixtures("utc")


def refuse(request: LaunchRequest) -> FakeSession:
    raise AssertionError(request)


def pressing(*keys: str) -> Callable[[Pilot[int]], Awaitable[None]]:
    async def before(pilot: Pilot[int]) -> None:
        await settle(pilot)
        await pilot.press(*keys)
        await settle(pilot)

    return before


LOOKS: dict[str, tuple[str, Callable[[], FakeSession | None], tuple[str, ...]]] = {
    "start": ("start", lambda: None, ("down", "down", "7")),
    "attention": ("attention", fake_gpt, ("down",)),
    "parameters": ("parameters", fake_gpt, ("o", "o", "down")),
    "samples-text": ("samples", fake_gpt, ()),
    "samples-images": ("samples", fake_vit, ()),
    "log": ("log", fake_gpt, ("c",)),
    "help": ("help", fake_gpt, ("slash", *"phase", "enter")),
}


def app_for(mode: str, session: FakeSession | None, **options: object) -> TuiTrainerApp:
    return TuiTrainerApp(
        session,
        start_mode=mode,
        on_launch=Launcher((gpt, vit), refuse),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("look", LOOKS)
async def test_looks(snapshot: SnapshotAssertion, tmp_path: Path, look: str) -> None:
    mode, session, keys = LOOKS[look]
    app = app_for(mode, session())
    pictures = Pictures(snapshot, tmp_path)
    async with app.run_test(size=SIZES[0]) as pilot:
        await pressing(*keys)(pilot)
        pictures.compare_at(app, SIZES[0])
        for name, theme in (("light", "tui-trainer-light"), ("sixteen_colours", "ansi-dark")):
            app.theme = theme
            await settle(pilot)
            pictures.compare(app, name)
        app.theme = "tui-trainer"
        for size in SIZES[1:] if look != "start" else ():
            await pilot.resize_terminal(*size)
            await settle(pilot)
            pictures.compare_at(app, size)
    assert not pictures.differing


@pytest.mark.parametrize("size", SIZES[1:], ids=lambda size: f"{size[0]}x{size[1]}")
def test_looks_of_the_unfolded_start_form(snap_compare: Compare, size: tuple[int, int]) -> None:
    """A narrow form stays folded in a terminal that becomes wider."""
    mode, session, keys = LOOKS["start"]
    assert snap_compare(app_for(mode, session()), terminal_size=size, run_before=pressing(*keys))


@pytest.mark.parametrize("look", LOOKS)
def test_looks_in_ascii(snap_compare: Compare, look: str) -> None:
    mode, session, keys = LOOKS[look]
    app = app_for(mode, session(), ascii=True)
    assert snap_compare(app, terminal_size=(80, 24), run_before=pressing(*keys))


@pytest.mark.parametrize("look", LOOKS)
def test_looks_without_colour(
    snap_compare: Compare, look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    mode, session, keys = LOOKS[look]
    app = app_for(mode, session())
    assert snap_compare(app, terminal_size=(80, 24), run_before=pressing(*keys))


@pytest.mark.parametrize("mode", ["attention", "parameters", "samples", "log"])
def test_looks_before_the_first_data(snap_compare: Compare, mode: str) -> None:
    app = app_for(mode, fake_empty())
    assert snap_compare(app, terminal_size=(80, 24), run_before=pressing())


@pytest.mark.parametrize("mode", ["attention", "parameters", "log"])
def test_looks_when_something_is_not_finite(snap_compare: Compare, mode: str) -> None:
    app = app_for(mode, fake_non_finite(steps=203))
    assert snap_compare(app, terminal_size=(120, 40), run_before=pressing())
