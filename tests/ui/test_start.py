from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from textual.widgets import Input

from tests.ui.fake import fake_gpt
from tests.ui.screens import settle, text_of, until
from tui_trainer.client.api import Session
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import options_of, value_text
from tui_trainer.config.training import resolve
from tui_trainer.protocol.schema import SCRIPT
from tui_trainer.runs.launch import LaunchError, LaunchRequest
from tui_trainer.tasks.gpt import task as gpt
from tui_trainer.tasks.vit import task as vit
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.screens.start import (
    Launcher,
    StartScreen,
    common_options,
    grouped_options,
    preset_value,
    request_for,
    script_request,
)
from tui_trainer.ui.widgets.form import ChoiceRow, FormRow


class Started:
    """A launcher that records its calls, and refuses on request."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.requests: list[LaunchRequest] = []
        self.refusal = refusal
        self.done = threading.Event()

    def __call__(self, request: LaunchRequest) -> Session:
        self.requests.append(request)
        self.done.set()
        if self.refusal:
            raise self.refusal
        return fake_gpt()


def app_with(start: Started) -> TuiTrainerApp:
    return TuiTrainerApp(None, start_mode="start", on_launch=Launcher((gpt, vit), start))


def form_of(app: TuiTrainerApp) -> str:
    """The task that the form on the screen is of, by a field that no other task has."""
    names = {row.option_name for row in app.screen.query(FormRow)}
    tasks = {"prompt": "gpt", "patch_size": "vit", "script": SCRIPT}
    return "".join(task for name, task in tasks.items() if name in names)


def preset_of(app: TuiTrainerApp) -> str:
    return app.screen.query_one("#row-preset", FormRow).value


def field_of(app: TuiTrainerApp) -> str | None:
    """The id of the field that has the focus."""
    return app.focused.id if isinstance(app.focused, Input) else None


async def launched(app: TuiTrainerApp, start: Started, times: int = 1) -> None:
    """Until the launcher has been called, and what it returned or raised is on the screen."""
    async with asyncio.timeout(240):
        while len(start.requests) < times:
            await asyncio.sleep(0.005)
    await app.workers.wait_for_complete()
    assert len(start.requests) == times


@pytest.mark.parametrize("task", [gpt, vit], ids=lambda task: task.name)
def test_every_option_is_on_the_form_once(task: object) -> None:
    every = [option.name for option in options_of(task.config)]  # type: ignore[attr-defined]
    on_form = [option.name for option in common_options(task)]  # type: ignore[arg-type]
    for options in grouped_options(task).values():  # type: ignore[arg-type]
        on_form += [option.name for option in options]
    assert sorted(on_form) == sorted(every)


@pytest.mark.parametrize("task", [gpt, vit], ids=lambda task: task.name)
def test_every_preset_starts_as_it_is(task: object) -> None:
    for preset in task.presets:  # type: ignore[attr-defined]
        entered = {
            option.name: value_text(preset_value(task, preset, option))  # type: ignore[arg-type]
            for option in options_of(task.config)  # type: ignore[attr-defined]
        }
        if preset not in ("digits", *gpt.presets):
            entered["data"] = "/some/images"
        request, errors = request_for(task, preset, entered)  # type: ignore[arg-type]
        assert errors == {}
        assert request is not None
        assert set(request.settings) <= {"preset", "data"}


def test_differences_are_overrides() -> None:
    entered = {"steps": "1e3", "learning_rate": "3e-4", "compile": "on", "data": ""}
    request, errors = request_for(gpt, "light", entered, start_paused=True)
    assert errors == {}
    assert request is not None
    assert request.paused
    assert dict(request.settings) == {
        "preset": "light",
        "steps": 1000,
        "learning_rate": 3e-4,
        "compile": True,
    }


def test_epochs_replace_the_steps_of_the_preset() -> None:
    request, errors = request_for(gpt, "light", {"steps": "", "epochs": "2"})
    assert errors == {}
    assert request is not None
    assert dict(request.settings) == {"preset": "light", "epochs": 2}


def test_errors_are_shown_at_their_fields() -> None:
    _, errors = request_for(gpt, "light", {"steps": "many", "batch_size": "0"})
    assert set(errors) == {"steps", "batch_size"}
    _, errors = request_for(gpt, "light", {"width": "65"})
    assert set(errors) == {"width"}
    assert "--heads" in errors["width"].hint


@pytest.mark.parametrize(
    ("path", "arguments", "field"),
    [("", "", "script"), ("/nowhere.py", "", "script"), ("/tmp", "", "script")],
)
def test_an_invalid_script_is_reported(path: str, arguments: str, field: str) -> None:
    request, errors = script_request(path, arguments)
    assert request is None
    assert set(errors) == {field}


def test_arguments_are_quoted_as_in_a_shell(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    request, _ = script_request(str(script), "--name 'two words' -v")
    assert request is not None
    assert request.arguments == ("--name", "two words", "-v")
    _, errors = script_request(str(script), "'open")
    assert set(errors) == {"arguments"}


async def test_enter_starts_the_defaults() -> None:
    start = Started()
    app = app_with(start)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("enter")
        await launched(app, start)
        await settle(pilot)
        assert app.current_mode == "dashboard"
    assert dict(start.requests[0].settings) == {"preset": "light"}
    assert start.requests[0].task == "gpt"


async def test_keys_alone_choose_task_preset_and_values() -> None:
    start = Started()
    app = app_with(start)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        for key, task in (("right", "vit"), ("right", SCRIPT), ("left", "vit"), ("left", "gpt")):
            await pilot.press(key)
            await until(pilot, lambda task=task: form_of(app) == task, f"the form of {task}")
        await pilot.press("down", "right")
        await until(pilot, lambda: preset_of(app) == "nanogpt-cpu", "the preset is chosen")
        await pilot.press("down", "down")
        await until(pilot, lambda: field_of(app) == "option-steps", "the field has the focus")
        await pilot.press("end", *["backspace"] * 6, *"77", "enter")
        await launched(app, start)
    assert dict(start.requests[0].settings) == {"preset": "nanogpt-cpu", "steps": 77}


async def test_a_field_keeps_the_focus_when_its_form_is_rebuilt() -> None:
    """Keys are faster than a task's form on a slow machine."""
    start = Started()
    app = app_with(start)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        screen = app.screen
        assert isinstance(screen, StartScreen)
        screen.query_one("#option-seed").focus()
        await settle(pilot)
        old = app.focused
        await screen._show_task()
        await settle(pilot)
        assert field_of(app) == "option-seed"
        assert app.focused is not old
        await pilot.press("end", *["backspace"] * 6, *"77", "enter")
        await launched(app, start)
    assert start.requests[0].settings["seed"] == 77


async def test_mouse_chooses_task_and_preset() -> None:
    start = Started()
    app = app_with(start)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        task = app.screen.query_one("#task", ChoiceRow)
        await pilot.click("#task", offset=(task.choices[0].__len__() + 5, 0))
        await settle(pilot)
        assert task.value == "vit"
        assert "digits" in text_of(app)
        await pilot.press("enter")
        await launched(app, start)
    assert start.requests[0].task == "vit"


async def test_a_folder_of_images_takes_the_preset_of_the_command_line(tmp_path: Path) -> None:
    start = Started()
    app = app_with(start)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("right")
        await settle(pilot)
        app.screen.query_one("#option-steps", Input).value = "77"
        app.screen.query_one("#option-data", Input).focus()
        await settle(pilot)
        assert app.screen.query_one("#preset", ChoiceRow).value == "digits"
        await pilot.press(*"/x")
        await settle(pilot)
        assert app.screen.query_one("#preset", ChoiceRow).value == "images"
        assert app.screen.query_one("#option-image_size", Input).value == "64"
        await pilot.press("backspace", "backspace")
        await settle(pilot)
        assert app.screen.query_one("#preset", ChoiceRow).value == "digits"
        assert app.screen.query_one("#option-image_size", Input).value == "8"
        app.screen.query_one("#option-data", Input).value = str(tmp_path)
        await pilot.press("enter")
        await launched(app, start)
    settings = dict(start.requests[0].settings)
    assert settings == {"preset": "images", "data": str(tmp_path), "steps": 77}
    config = resolve(vit, None, settings)
    assert config == resolve(vit, None, {"data": str(tmp_path), "steps": 77})


async def test_a_preset_chosen_by_hand_stays_when_data_is_typed(tmp_path: Path) -> None:
    start = Started()
    app = app_with(start)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("right", "down", "left")
        await settle(pilot)
        assert app.screen.query_one("#preset", ChoiceRow).value == "face-s14"
        app.screen.query_one("#option-data", Input).value = str(tmp_path)
        await settle(pilot)
        await pilot.press("enter")
        await launched(app, start)
    assert start.requests[0].settings["preset"] == "face-s14"


async def test_a_wrong_value_is_reported_below_its_field_and_nothing_starts() -> None:
    start = Started()
    app = app_with(start)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        app.screen.query_one("#option-batch_size", Input).value = "none"
        await settle(pilot)
        await pilot.press("enter")
        await settle(pilot)
        text = text_of(app)
        assert "--batch-size cannot be 'none'" in text
        assert app.focused is app.screen.query_one("#option-batch_size")
        await pilot.press("end", *["backspace"] * 4, "8")
        await settle(pilot)
        assert "cannot be" not in text_of(app)

        # One in a folded group unfolds it.
        app.screen.query_one("#option-width", Input).value = "65"
        await settle(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert "cannot be divided among" in text_of(app)
    assert start.requests == []


async def test_a_refused_start_is_shown_and_nothing_typed_is_lost() -> None:
    start = Started()
    app = app_with(start)
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot)
        app.screen.query_one("#option-steps", Input).value = "123"
        await settle(pilot)
        refusals = (
            LaunchError("the device cuda is not there", "try --device cpu"),
            ConfigurationError("the corpus has 3 characters", "try a longer one"),
            OSError("disk full"),
        )
        for times, start.refusal in enumerate(refusals, 1):
            await pilot.press("enter")
            await launched(app, start, times)
            await settle(pilot)
            assert str(start.refusal.args[0]) in text_of(app)
            assert app.current_mode == "start"
            assert app.screen.query_one("#option-steps", Input).value == "123"


async def test_typed_values_survive_a_switch_to_another_task() -> None:
    app = app_with(Started())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        app.screen.query_one("#option-steps", Input).value = "123"
        await settle(pilot)
        await pilot.press("right")
        await settle(pilot)
        await pilot.press("left")
        await settle(pilot)
        assert app.screen.query_one("#option-steps", Input).value == "123"
        await pilot.press("ctrl+r")
        await settle(pilot)
        assert app.screen.query_one("#option-steps", Input).value == "3000"


async def test_a_script_with_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    start = Started()
    app = app_with(start)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("left")
        await settle(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert "which script?" in text_of(app)
        app.screen.query_one("#option-script", Input).value = str(script)
        app.screen.query_one("#option-arguments", Input).value = "--fast"
        await settle(pilot)
        await pilot.press("enter")
        await launched(app, start)
    assert start.requests[0].script == str(script)
    assert start.requests[0].arguments == ("--fast",)


async def test_without_a_launcher_it_says_so() -> None:
    app = TuiTrainerApp(None, start_mode="start")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert isinstance(app.screen, StartScreen)
        await pilot.press("enter")
        await settle(pilot)
        assert "which script?" in text_of(app)
