"""The inspector: what it asks for and when, what it shows, and that it never breaks."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest

from tests.ui.fake import FakeSession, fake_empty, fake_gpt
from tests.ui.fake_tensors import BIAS, HEAD, WEIGHT
from tests.ui.screens import SIZES, app_on, frame, settle, text_of, until
from tui_trainer.client.replay import NO_TENSORS
from tui_trainer.history.healthy_ranges import HealthyRange
from tui_trainer.protocol.actions import Pause, Resume
from tui_trainer.protocol.autograd import CheckGradient, DescribeGraph
from tui_trainer.protocol.heat_map import HeatMapWindow
from tui_trainer.protocol.inspection import (
    BeforePhase,
    DescribeUse,
    ExplainUpdate,
    Histogram,
    Inspected,
    ListTensors,
    ReadTensor,
    Summarize,
    TensorMoments,
    TensorRef,
)
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.panels import tensor_statistics
from tui_trainer.ui.panels.tensor import Viewport, color_range
from tui_trainer.ui.panels.tensor_statistics import StatisticsReading, bars, recorded_columns
from tui_trainer.ui.screens import inspect as screen
from tui_trainer.ui.screens import inspection_requests
from tui_trainer.ui.screens.dialogs import TextPrompt
from tui_trainer.ui.screens.parameter_groups import ParameterGroupsScreen


def paused_app(ref: TensorRef | None = TensorRef(WEIGHT)) -> tuple[TuiTrainerApp, FakeSession]:  # noqa: B008
    session = fake_gpt()
    session.send(Pause())
    app = app_on("inspect", session)
    app.inspected = ref
    return app, session


def summaries(session: FakeSession) -> list[Summarize]:
    return [each for each in session.inspected if isinstance(each, Summarize)]


@pytest.mark.parametrize("size", [*SIZES, (60, 24), (40, 10)], ids=str)
async def test_a_tensor_as_heat_map_and_numbers(size):
    app, session = paused_app()
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await settle(pilot)
        if size[0] < screen.MIN_WIDTH_BESIDE:
            await pilot.press("v")
            await settle(pilot)
        shown = text_of(app)
        assert "96×300 float32" in shown
        assert re.search(r"mean +0\.004", shown)
        window = summaries(session)[-1].window
        if size == (120, 40):
            assert "step 300, after step" in shown
            assert window.rows > 60
            assert window.columns > 70


async def test_it_reads_again_at_each_stop_and_seldom_while_running(monkeypatch):
    app, session = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await settle(pilot)
        before = len(session.inspected)
        for _ in range(3):
            await frame(pilot)
        assert len(session.inspected) == before
        session._notice("edit", "back to the state of step 1", 300)  # a script counts on
        session._changed()
        await frame(pilot)
        await until(pilot, lambda: len(session.inspected) > before, "the tensor as it is now")
        assert summaries(session)[-1].statistics
        await settle(pilot)
        before = len(session.inspected)
        session.advance(1)
        await frame(pilot)
        await until(pilot, lambda: len(session.inspected) > before, "another request")
        assert summaries(session)[-1].statistics
        monkeypatch.setattr(inspection_requests, "MIN_INTERVAL_S", 1e9)
        session.send(Resume())
        await frame(pilot)
        await settle(pilot)
        before = len(session.inspected)
        for _ in range(5):
            session.advance(1)
            await frame(pilot)
        assert len(session.inspected) <= before + 1


async def test_zoom_and_pan_ask_for_another_window_only():
    app, session = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await settle(pilot)
        await pilot.press("plus", "right", "down", "m")
        await settle(pilot)
        last = summaries(session)[-1]
        assert not last.statistics
        assert (last.window.row_from, last.window.row_to) == (36, 84)
        assert (last.window.column_from, last.window.column_to) == (112, 262)
        assert last.window.reduction == "mean"
        shown = text_of(app)
        assert "36–83" in shown
        assert "96×300 float32" in shown  # the numbers stay
        await pilot.press("f")
        await settle(pilot)
        assert summaries(session)[-1].window.row_to is None


async def test_choosing_another_tensor():
    app, _ = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await pilot.press("slash")
        await until(pilot, lambda: isinstance(app.screen, screen.TensorDialog), "the dialog")
        await pilot.press(*"head", "enter")
        await until(pilot, lambda: "not finite: 1 nan, 1 inf" in text_of(app), "the other tensor")
        assert app.inspected == TensorRef(HEAD)
        await pilot.press("left_square_bracket")
        await until(pilot, lambda: app.inspected == TensorRef(BIAS), "the one before")
        await settle(pilot)
        assert "entries 0–699" in re.sub(" +", " ", text_of(app))
        await pilot.press("left_square_bracket")
        await until(pilot, lambda: app.inspected == TensorRef(WEIGHT), "the first")
        await pilot.press("k")
        await until(pilot, lambda: app.inspected == TensorRef(WEIGHT, "gradient"), "its gradient")
        await pilot.press("k")
        wanted = TensorRef(WEIGHT, "state", "exp_avg")
        await until(pilot, lambda: app.inspected == wanted, "its state")
        await settle(pilot)
        assert f"exp_avg of {WEIGHT}" in text_of(app)


async def test_unreadable_tensors_have_a_reason():
    app, session = paused_app(TensorRef(HEAD, "gradient"))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "has no gradient now" in text_of(app), "the reason")
        assert "pause after backward" in text_of(app)
        session.end("finished", "all steps made")
        await frame(pilot)


async def test_every_key_on_unusual_tensors_at_every_size():
    app, _ = paused_app(TensorRef("empty"))
    keys = ("plus", "plus", "right", "down", "minus", "left", "up", "f", "m", "m", "l", "v")
    async with app.run_test(size=SIZES[0]) as pilot:
        for ref in (TensorRef("empty"), TensorRef(BIAS), TensorRef(HEAD)):
            app.inspected = ref
            app.redraw()
            for size in SIZES:
                await pilot.resize_terminal(*size)
                await until(pilot, lambda: app.screen.summary is not None, "an answer")
                await pilot.press(*keys)
                await settle(pilot)
                assert ref.name in text_of(app)


async def test_without_a_tensor_without_a_run_and_over_a_recording():
    app, session = paused_app(None)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: isinstance(app.screen, screen.TensorDialog), "the list")
        await pilot.press("escape")
        await settle(pilot)
        assert "no tensor is chosen" in text_of(app)
        for key in ("plus", "right", "m", "l", "k", "right_square_bracket"):
            await pilot.press(key)
        await frame(pilot)
        assert session.inspected == [ListTensors()]  # once, until the screen is left
        await pilot.press("5", "0")
        await until(pilot, lambda: isinstance(app.screen, screen.TensorDialog), "the list again")
    app = app_on("inspect", fake_empty())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "waiting: importing torch" in text_of(app)
    app, session = paused_app()
    failed = Inspected(0, "failed", message=NO_TENSORS)
    session.tensors.answer = lambda request, status: failed
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: NO_TENSORS in text_of(app), "the reason")
        await pilot.press("slash")
        await settle(pilot)
        assert not isinstance(app.screen, screen.TensorDialog)


async def test_an_answer_to_an_older_request_is_dropped():
    app, session = paused_app()
    session.hold_answers = True
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: bool(session.held), "a request")
        app.inspected = TensorRef(HEAD)
        app.redraw()
        await settle(pilot)
        first, last = session.held[0], session.held[-1]
        requests = session.inspected
        assert requests[-1].tensor == TensorRef(HEAD)
        last.set_result(session.tensors.answer(requests[-1], session.status))
        await until(pilot, lambda: "12×20" in text_of(app), "the newer answer")
        first.set_result(session.tensors.answer(requests[0], session.status))
        await settle(pilot)
        assert "12×20" in text_of(app)


async def test_the_parameter_under_the_cursor_opens_with_enter():
    session = fake_gpt()
    app = app_on("parameters", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("down", "enter")
        await until(pilot, lambda: app.current_mode == "inspect", "the inspector")
        assert app.inspected == TensorRef(session.run.info.parameters[1].name)
    app = app_on("dashboard", session)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        panel = app.screen.query_one("#gradients")
        name = session.run.info.parameters[2].name
        app.screen.select(name)
        await settle(pilot)
        assert panel.parameter(panel.current_row) == name
        await pilot.press("enter")
        await until(pilot, lambda: app.current_mode == "inspect", "the inspector")
        assert app.inspected == TensorRef(name, "gradient")
    assert ListTensors() not in session.inspected


def test_a_viewport_stays_inside_of_its_tensor():
    view, matrix = Viewport(), (10, 1000)
    for _ in range(12):
        view.zoom(matrix, 0.5)
    assert view.rows == (3, 5)
    assert view.columns[1] - view.columns[0] == 2
    for _ in range(2000):
        view.pan(matrix, 1, 1)
    assert view.rows == (8, 10)
    assert view.columns == (998, 1000)
    for _ in range(12):
        view.zoom(matrix, 2.0)
    assert view.whole
    assert view.window((5, 7)) == HeatMapWindow(5, 7)
    view.pan(matrix, 1, 1)
    assert view.whole


def test_colours_are_around_zero_for_signed_values_only():
    cells = np.array([[1.0, -3.0], [np.nan, 2.0]], np.float32)
    assert color_range(cells, "mean") == (-3.0, 3.0)
    assert color_range(np.abs(cells), "mean_abs") == (1.0, 3.0)
    assert color_range(np.full((2, 2), np.nan, np.float32), "mean") == (0.0, 0.0)


def test_each_bin_with_an_entry_shows():
    lines = bars(Histogram(0, 1, (0, 1, 100_000, 0)), 8, 3, "▁▂▃▄▅▆▇█")
    assert lines == ["    ██  ", "    ██  ", "  ▁▁██  "]


async def test_the_update_of_a_parameter_and_of_an_entry():
    app, session = paused_app()
    async with app.run_test(size=SIZES[0]) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await pilot.press("u")
        await until(pilot, lambda: app.screen.explanation is not None, "the update")
        assert ExplainUpdate(WEIGHT) in session.inspected
        for size in SIZES:
            await pilot.resize_terminal(*size)
            await settle(pilot)
            shown = text_of(app)
            assert "whole tensor, in norms" in shown
            assert "β₁·m + (1−β₁)·g" in shown
        await pilot.press("x")
        await until(pilot, lambda: isinstance(app.screen, TextPrompt), "the prompt")
        await pilot.press(*"3,17", "enter")
        wanted = ExplainUpdate(WEIGHT, (3, 17))
        await until(pilot, lambda: wanted in session.inspected, "the entry")
        for size in SIZES:
            await pilot.resize_terminal(*size)
            await until(pilot, lambda: "entry [3, 17]" in text_of(app), "its update")
            assert "0.9·0.00042 + 0.1·(-0.0143)" in text_of(app)
        before = session.inspected.count(wanted)
        session.advance(1)
        await frame(pilot)
        await until(pilot, lambda: session.inspected.count(wanted) > before, "the next step's")
        await pilot.press("u")
        for size in SIZES:
            await pilot.resize_terminal(*size)
            await settle(pilot)
            assert "entry [3, 17]" not in text_of(app)


async def test_an_update_that_cannot_be_explained_says_why():
    app, session = paused_app()
    answer = session.tensors.answer

    def refuse(request, status):
        if isinstance(request, ExplainUpdate):
            return Inspected(1, "failed", message="no optimizer holds it", hint="freeze less")
        return answer(request, status)

    session.tensors.answer = refuse
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await pilot.press("u")
        await until(pilot, lambda: "no optimizer holds it" in text_of(app), "the reason")
        assert "freeze less" in text_of(app)


async def test_a_gradient_is_checked_on_request():
    app, session = paused_app()
    async with app.run_test(size=SIZES[0]) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await settle(pilot)
        assert not any(isinstance(each, CheckGradient) for each in session.inspected)
        await pilot.press("c")
        await until(pilot, lambda: app.screen.gradient_check is not None, "the check")
        for size in SIZES:
            await pilot.resize_terminal(*size)
            await settle(pilot)
            shown = text_of(app)
            assert "[5, 53]" in shown
            assert "1.0e-08" in shown
        assert sum(isinstance(each, CheckGradient) for each in session.inspected) == 1
        await frame(pilot)
        assert sum(isinstance(each, CheckGradient) for each in session.inspected) == 1
        await pilot.press("c")
        for size in SIZES:
            await pilot.resize_terminal(*size)
            await settle(pilot)
            assert "[5, 53]" not in text_of(app)


async def test_what_has_changed_since_the_last_reading():
    app, session = paused_app()
    answer = session.tensors.answer

    def growing(request, status):
        found = answer(request, status)
        if isinstance(request, Summarize) and request.statistics:
            statistics = found.result.statistics
            grown = msgspec.structs.replace(statistics, norm=statistics.norm + status.step)
            result = msgspec.structs.replace(found.result, statistics=grown)
            found = msgspec.structs.replace(found, result=result)
        return found

    session.tensors.answer = growing
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await settle(pilot)
        assert "Since" not in text_of(app)
        for number in range(2, 6):
            session.advance(1)
            await frame(pilot)
            await until(pilot, lambda n=number: len(app.screen._history) == n, "another reading")
        await settle(pilot)
        shown = text_of(app)
        assert re.search(r"Since .* step 303, after step", shown)
        assert re.search(r"norm .*\+1", shown)
        await pilot.press("right_square_bracket")
        await until(pilot, lambda: app.inspected == TensorRef(BIAS), "the next tensor")
        await settle(pilot)
        assert "Since" not in text_of(app)


async def test_what_the_last_phase_has_changed_and_what_the_run_has_recorded(monkeypatch):
    app, session = paused_app()
    session.tensors.before = {
        TensorRef(WEIGHT): BeforePhase(300, "clip", TensorMoments(-1, 1, 0.5, 0.1, 8, 2, 1)),
        TensorRef(WEIGHT, "gradient"): BeforePhase(300, "loss", None),
    }
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await settle(pilot)
        shown = text_of(app)
        assert re.search(r"Last phase .* clip → step", shown)
        assert re.search(r"norm +8\.000 +\+0\.97", shown)
        assert re.search(r"zeros +2  -2", shown)
        assert re.search(r"History .* steps 1–300", shown)
        assert re.search(r"‖g‖ +\S+ +0\.\d+", shown)
        app.inspected = TensorRef(WEIGHT, "gradient")
        app.redraw()
        await until(pilot, lambda: "it was not there before step" in text_of(app), "no gradient")
        now = app.screen._history[-1].statistics
        same = TensorMoments(now.minimum, now.maximum, now.mean, now.std, now.norm, now.zeros, 0)
        session.tensors.before = {TensorRef(WEIGHT): BeforePhase(300, "loss", same)}
        numbers = app.screen.numbers
        reading = StatisticsReading("", now, "backward", BeforePhase(300, "loss", same))
        numbers.show(numbers.tensor, now, [reading])
        await settle(pilot)
        assert "backward has not changed it" in text_of(app)
        columns = recorded_columns(app.snapshot, TensorRef(WEIGHT))
        assert [each.label for each in columns] == ["‖w‖", "‖g‖", "Δw/w"]
        assert not recorded_columns(app.snapshot, TensorRef(WEIGHT, "state", "exp_avg"))
        monkeypatch.setattr(tensor_statistics, "UPDATE_RATIO", HealthyRange(high=1e-9))
        numbers.show(numbers.tensor, now, (), columns)
        rows = ["".join(segment.text for segment in row) for row in numbers._all_rows(40)]
        newest = next(place for place, row in enumerate(rows) if row.startswith("Δw/w"))
        assert rows[newest + 1].strip() == "above the healthy up to 1e-9"


async def test_the_numbers_scroll_by_pages():
    app, _ = paused_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await settle(pilot)
        assert "[95, 157]" not in text_of(app)
        await pilot.press("pagedown")
        await until(pilot, lambda: "[95, 157]" in text_of(app), "the smallest entries")
        await pilot.press("pageup")
        await until(pilot, lambda: "96×300 float32" in text_of(app), "the first line again")


async def test_choosing_what_a_module_returns():
    app, _ = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await pilot.press("o")
        await until(pilot, lambda: isinstance(app.screen, screen.TensorDialog), "the dialog")
        await settle(pilot)
        assert "output of blocks.0.attention" in text_of(app)
        await pilot.press("enter")
        chosen = TensorRef("blocks.0.attention", "output")
        await until(pilot, lambda: app.inspected == chosen, "the output")


async def test_groups_that_get_their_width_after_the_layout_take_the_rows_they_need(monkeypatch):
    monkeypatch.setattr(ParameterGroupsScreen, "call_after_refresh", lambda self, call: call())
    app, _ = paused_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await pilot.press("G")
        await until(pilot, lambda: "adamw, group 0" in text_of(app), "the rows of a group")


async def test_groups_memory_and_what_is_unusual_about_parameters():
    app, session = paused_app()
    parts = (
        "adamw, group 0 2 parameters, 29.0k entries",
        "weight_decay 0.1",
        "weight_decay 0",
        "optimizer state cpu 232.8 KB",
        "saved for backward cpu 1.2 MB",
        "temperature none in no optimizer",
        "norm.weight adamw 1 not used by the loss",
        f"{HEAD} adamw 0 = decoder.weight",
    )
    async with app.run_test(size=SIZES[0]) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await pilot.press("G")
        await until(pilot, lambda: isinstance(app.screen, ParameterGroupsScreen), "the groups")
        for size in SIZES:
            await pilot.resize_terminal(*size)
            for part in parts:
                await until(pilot, lambda p=part: p in re.sub(" +", " ", text_of(app)), part)
            assert "foreach" not in text_of(app)
        before, tensors = session.inspected.count(DescribeUse()), len(summaries(session))
        session.advance(1)
        await frame(pilot)
        await until(pilot, lambda: session.inspected.count(DescribeUse()) > before, "read again")
        assert len(summaries(session)) == tensors, "the screen behind does not take its place"
        await pilot.press("down", "enter")
        await until(pilot, lambda: app.inspected == TensorRef("norm.weight"), "the parameter")
        assert isinstance(app.screen, screen.InspectScreen)


async def test_a_tensor_is_written_to_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app, session = paused_app(TensorRef(WEIGHT, "gradient"))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await pilot.press("w", "enter")
        path = tmp_path / f"{WEIGHT}.grad.npy"
        await until(pilot, lambda: not app.screen._saving and path.exists(), "the file")
        assert np.load(path).shape == (96, 300)
        assert [each.offset > 0 for each in session.inspected if isinstance(each, ReadTensor)] == [
            False,
            True,
        ]
        await pilot.press("w", "enter")
        await until(pilot, lambda: "already exists" in text_of(app), "the reason")
        assert not app.screen._saving
        await pilot.press("w", "a", "enter")
        await until(pilot, lambda: "must end in .npy or" in text_of(app), "the reason")
        await pilot.press("w", "escape")
        await until(pilot, lambda: not app.screen._saving, "the screen")


@pytest.mark.parametrize(("key", "kind"), [("u", ExplainUpdate), ("c", CheckGradient)])
async def test_a_new_layout_does_not_replace_the_request_for_what_it_shows(key, kind):
    app, session = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        await settle(pilot)
        session.hold_answers = True
        await pilot.press(key)
        await until(pilot, lambda: isinstance(session.inspected[-1], kind), "the request")
        await pilot.resize_terminal(200, 60)
        await frame(pilot)
        assert isinstance(session.inspected[-1], kind)
        session.hold_answers = False
        session.held[-1].set_result(session.tensors.answer(session.inspected[-1], session.status))
        title = "Gradient check" if key == "c" else "whole tensor, in norms"
        await until(pilot, lambda: title in text_of(app), "the answer")
        await until(pilot, lambda: isinstance(session.inspected[-1], Summarize), "the new window")


async def test_what_another_screen_has_replaced_is_asked_for_again():
    app, session = paused_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.summary is not None, "an answer")
        session.hold_answers = True
        session.advance(1)
        await frame(pilot)
        await until(pilot, lambda: not session.held[-1].done(), "another request")
        session.held[-1].cancel()
        session.hold_answers = False
        await pilot.press("5", "0")
        await until(pilot, lambda: "step 301" in text_of(app), "the answer to a third one")
        session.hold_answers = True
        await pilot.press("c")
        await until(pilot, lambda: isinstance(session.inspected[-1], CheckGradient), "the request")
        session.held[-1].cancel()
        session.hold_answers = False
        await pilot.press("5", "0")
        await until(pilot, lambda: "interrupted by another" in text_of(app), "the reason")
        session.hold_answers = True
        await pilot.press("g")
        await until(pilot, lambda: DescribeGraph() in session.inspected, "the request")
        session.held[-1].cancel()
        session.hold_answers = False
        await pilot.press("5", "g")
        await until(pilot, lambda: app.screen.graph is not None, "the graph")
