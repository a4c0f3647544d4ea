"""A run that has ended: keys that do nothing are not shown, and what can be done next is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from textual.widgets import OptionList

from tests.ui.fake import FakeSession, fake_gpt
from tests.ui.screens import app_on, frame, settle, text_of, until
from tests.ui.test_replay import record_run
from tui_trainer.client.replay import ReplaySession
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.ui.leaving import EndedDialog, Leaving, next_steps
from tui_trainer.ui.replay_app import ReplayApp


def ended(directory: Path | None = None) -> FakeSession:
    session = fake_gpt(300)
    assert session.run is not None
    session.run.info = msgspec.structs.replace(
        session.run.info,
        directory=str(directory or ""),
        command=("tui-trainer", "gpt", "--steps", "300"),
    )
    session.end("finished", "all steps made")
    return session


@pytest.fixture
def next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leaving, "next_command", ())


@pytest.mark.parametrize("mode", ["dashboard", "parameters", "log"])
async def test_keys_that_control_a_run_are_gone(mode: str) -> None:
    session = fake_gpt(300)
    app = app_on(mode, session)
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        assert "s Step" in text_of(app).splitlines()[-1]
        session.end("finished", "all steps made")
        await frame(pilot)
        keys = text_of(app).splitlines()[-1]
        assert "space What next" in keys
        for gone in ("s Step", "p Phase", "n N steps", "b Breakpoints", "t Throttle"):
            assert gone not in keys


async def test_what_next_is_chosen_and_run_after_leaving(
    tmp_path: Path, next_command: None
) -> None:
    app = app_on("dashboard", ended(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        await pilot.press("space")
        await until(pilot, lambda: isinstance(app.screen, EndedDialog), "the dialog")
        await settle(pilot)
        text = text_of(app)
        for offer in ("Replay", "Report", "Start again", "tui-trainer gpt --steps 300"):
            assert offer in text
        app.screen.query_one(OptionList).highlighted = 0
        await pilot.press("enter")
        await settle(pilot)
    assert Leaving.next_command == ("replay", str(tmp_path))


async def test_a_run_on_another_machine_offers_nothing() -> None:
    app = app_on("dashboard", ended(Path("/nowhere/at/all")))
    async with app.run_test(size=(120, 40)) as pilot:
        await frame(pilot)
        await pilot.press("space")
        await until(pilot, lambda: len(app._notifications), "the notice")
        assert "another machine" in next(iter(app._notifications)).message
        assert not isinstance(app.screen, EndedDialog)


def test_a_comparison_with_the_newest_other_runs(tmp_path: Path, monkeypatch) -> None:
    from tests.recorded_runs import directory
    from tui_trainer.runs.recording import open_history

    info = open_history(directory("calm")).store.info()
    assert info is not None
    info = msgspec.structs.replace(info, directory=str(directory("calm")))
    titles = [step.title for step in next_steps(info, replayed=False)]
    assert titles[:2] == ["Replay", "Compare with eager"]
    assert next_steps(info, replayed=True)[0].title == "Compare with eager"


@pytest.mark.parametrize(
    ("task", "saved", "offered"),
    [("gpt", (100, 250), True), ("gpt", (100, 300), False), ("gpt", (), False),
     ("script", (100,), False)],
)  # fmt: skip
def test_resuming_where_a_checkpoint_is_left(tmp_path: Path, task, saved, offered) -> None:
    for step in saved:
        (tmp_path / f"checkpoints/step-{step:08}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step:08}/state.json").touch()
    info = RunInfo("r", task, directory=str(tmp_path), total_steps=300)
    found = [step.command for step in next_steps(info, False) if step.title == "Resume"]
    assert found == ([(task, "--resume", str(tmp_path))] if offered else [])


@pytest.mark.parametrize(
    "command", ["run --name r train.py --name r", "run --name=r train.py --name r"]
)
def test_starting_again_leaves_out_the_name_that_is_taken(tmp_path: Path, command: str) -> None:
    words = ("tui-trainer", *command.split())
    info = RunInfo("r", "script", directory=str(tmp_path), command=words)
    (again,) = (step.command for step in next_steps(info, True) if step.title == "Start again")
    assert again == ("run", "train.py", "--name", "r")


async def test_help_of_a_replay_is_about_the_replay(tmp_path: Path) -> None:
    record_run(tmp_path, steps=20)
    app = ReplayApp(ReplaySession(tmp_path), frames_per_second=0.01)
    async with app.run_test(size=(120, 60)) as pilot:
        await settle(pilot)
        await pilot.press("3")
        await settle(pilot)
        await pilot.press("question_mark")
        await settle(pilot)
        text = text_of(app)
        assert "This screen: Parameters" in text
        assert "Looking back" in text
        assert "Play the recording, or pause" in text
        assert "In the list of breakpoints" not in text
        await pilot.press("escape")
        await settle(pilot)
        assert app.current_mode == "parameters"


async def test_help_begins_with_the_screen_that_one_came_from() -> None:
    app = app_on("dashboard", fake_gpt(300))
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        for key, title in (("5", "Log"), ("2", "Attention")):
            await pilot.press(key)
            await settle(pilot)
            await pilot.press("question_mark")
            await settle(pilot)
            assert f"This screen: {title}" in "\n".join(text_of(app).splitlines()[:10])
            await pilot.press("escape")
            await settle(pilot)


async def test_the_file_and_line_of_a_crash_are_not_cut() -> None:
    session = fake_gpt(300)
    error = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (64x10 and 20x64)"
    where = "/home/somebody/projects/a-rather-long-name/training/train_classifier.py:41 in forward"
    session.end("crashed", error, f"{where}: tui-trainer logs prints the traceback")
    app = app_on("dashboard", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await frame(pilot)
        text = " ".join(line.strip() for line in text_of(app).splitlines())
        assert error in text
        assert where in text
