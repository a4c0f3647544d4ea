"""Looking back: every panel shows the cursor's step, and the keys and the mouse move it."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest

from tests.once import made_once
from tests.rows import clip_row, step_row
from tests.store.test_store import Clock
from tests.ui.screens import SIZES, settle, text_of
from tui_trainer.client.replay import ReplaySession
from tui_trainer.history.records import ClipRecord, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import TextSample
from tui_trainer.protocol.schema import AttentionInfo, Column, ParameterInfo, RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.writer import StoreWriter
from tui_trainer.ui.replay_app import ReplayApp, TransportLine
from tui_trainer.ui.screens import SCREENS

STEPS = 1000
CLIPS = (100, 400, 900)
SPIKE, WORSE = 300, 640
BAD = 700
MARK = 520
LAYERS = ("blocks.0.attention", "blocks.1.attention")


def loss_at(step):
    value = 4 / (1 + step / 200) + 0.02 * np.sin(step * 12.9898)
    value += {SPIKE: 0.8, WORSE: 2.5}.get(step, 0.0)
    return np.nan if step == BAD else value


def record_run(directory, steps=STEPS, end="finished"):
    """A run with clips, spikes, a NaN and a mark at known steps, 20 steps a second."""
    names = [
        f"blocks.{n}.attention.{w}.weight" for n in range(2) for w in ("query", "key", "value")
    ]
    parameters = tuple(ParameterInfo(name, (8, 8), "float32", 64) for name in names)
    layers = tuple(
        AttentionInfo(layer, "separate", *names[3 * n : 3 * n + 3], 2, 2, 4)
        for n, layer in enumerate(LAYERS)
    )
    recorder = Recorder(RunInfo("quiet-otter", "gpt", "gpt · small", total_steps=1000))
    sink = StoreWriter(directory)
    recorder.subscribe(sink)
    recorder.describe(parameters=parameters, attention=layers, steps_per_epoch=250)
    step_table = recorder.new_table(schema.STEP, schema.STEP_COLUMNS)
    clip_table = recorder.new_table(schema.CLIP, schema.CLIP_COLUMNS)
    norm_table = recorder.new_table(schema.GRAD_NORM, [Column(name) for name in names])
    columns = schema.attention_columns(LAYERS, schema.ATTENTION_STATISTICS)
    attention_table = recorder.new_table(schema.ATTENTION, columns)
    for n in range(1, steps + 1):
        norm = 2.0 if n in CLIPS else 0.5 + 0.1 * np.cos(n)
        scale = min(1.0, 1 / norm)
        rows = (
            (step_table, step_row(loss_at(n), 1e-3, norm, 50)),
            (clip_table, clip_row(1, norm, norm * scale, scale)),
            (norm_table, np.full(6, n, np.float32)),
            (attention_table, np.full(len(columns), n / 1000, np.float32)),
        )
        clip = ClipRecord(1.0, norm, scale, (0,), (0.9,)) if scale < 1 else None
        bad = (("loss", "", "nan"),) if n == BAD else ()
        recorder.record(StepRecord(n, 1.7e9 + n / 20, "", rows, clip, bad))
        if n == MARK:
            recorder.notice("mark", "look here", step=n, who="me")
        if n % 250 == 0:
            recorder.artifact(TextSample(0, n, "To", f"sample of step {n}"))
        if n % 100 == 0:
            recorder.log("stdout", f"line of step {n}")
            assert recorder.flush(240)
            sink.commit()
    if end:
        recorder.end(end, "all steps made" if end == "finished" else "it broke")
        assert recorder.close(240)
    return recorder


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """Each worker reads a copy: readers write to the index of SQLite's journal in the folder."""
    copy = tmp_path_factory.mktemp("replayed") / "quiet-otter"
    return shutil.copytree(made_once("replayed run", record_run), copy)


def opened(directory, **options):
    clock = Clock()
    replay = ReplaySession(directory, clock)
    return ReplayApp(replay, frames_per_second=0.01, **options), replay, clock


async def press(pilot, *keys):
    await pilot.press(*keys)
    await settle(pilot)


async def test_every_screen_has_the_line_and_shows_the_step(recorded):
    app, replay, _ = opened(recorded)
    async with app.run_test(size=SIZES[0]) as pilot:
        await settle(pilot)
        assert app.screen.query_one(TransportLine).region.y == SIZES[0][1] - 2
        assert "finished" in text_of(app)
        replay.seek(250)
        app.draw_frame()
        for place in SCREENS:
            if place.mode == "start":
                continue
            await press(pilot, place.key)
            for size in SIZES:
                await pilot.resize_terminal(*size)
                await settle(pilot)
                line = app.screen.query_one(TransportLine)
                assert line.region.y == size[1] - 2
                assert line.region.width == size[0]
                shown = text_of(app)
                assert "step   250/1,000" in shown, place.mode
                for later in ("step 500", "step 750", "step 1000"):
                    assert f"sample of {later}" not in shown
                    assert f"line of {later}" not in shown
        assert app.snapshot.history.table("step").last_step == 250
        assert app.snapshot.status.steps_per_second == pytest.approx(20)


async def test_there_is_one_clock_of_frames(recorded):
    """Textual calls a base's `on_mount` by itself: called from here too, all of it ran twice."""
    app = ReplayApp(ReplaySession(recorded))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        clocks = [timer for timer in app._timers if timer._callback == app._tick]
        assert len(clocks) == 1


async def test_keys_move_the_cursor(recorded):
    app, replay, _ = opened(recorded)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert replay.cursor == STEPS
        for keys, step in [
            (("left",), 999),
            (("shift+left",), 989),
            (("right", "right"), 991),
            (("shift+right",), 1000),
            (("home",), 0),
            (("s",), 1),
            (("e",), 250),
            (("end",), 1000),
            (("home", "c"), 100),
            (("c",), 400),
            (("C",), 100),
            (("i",), BAD),
            (("b",), BAD),
            (("B",), MARK),
            (("z",), WORSE),
            (("z",), SPIKE),
            (("Z",), WORSE),
        ]:
            await press(pilot, *keys)
            assert replay.cursor == step, keys
            assert app.snapshot.status.step == step
        assert "worst spike" in text_of(app)


async def test_play_pause_and_speed(recorded):
    app, replay, clock = opened(recorded)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await press(pilot, "home", "space")
        assert replay.playing
        clock.now += 2
        app.draw_frame()
        assert replay.cursor == pytest.approx(40, abs=1)
        for _ in range(8):
            await press(pilot, ">")
        assert replay.factor == pytest.approx(64)
        await press(pilot, *"<<<<<<<<<<<<")
        assert replay.factor == pytest.approx(0.25)
        assert "0.25×" in text_of(app)
        await press(pilot, "space")
        here = replay.cursor
        clock.now += 50
        app.draw_frame()
        assert replay.cursor == here
        await press(pilot, "end", "space")  # from the end it starts over
        assert replay.cursor == 0
        assert replay.playing


async def test_the_mouse_seeks_and_drags(recorded):
    app, replay, _ = opened(recorded)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        line = app.screen.query_one(TransportLine)
        start, cells = line._track
        await pilot.click(TransportLine, offset=(start, 0))
        assert replay.cursor == 0
        await pilot.click(TransportLine, offset=(start + cells - 1, 0))
        assert replay.cursor == STEPS
        await pilot.mouse_down(TransportLine, offset=(start + cells // 2, 0))
        assert abs(replay.cursor - STEPS // 2) <= STEPS // cells + 1
        await pilot.hover(TransportLine, offset=(start + cells // 4, 0))
        await pilot.mouse_up(TransportLine, offset=(start + cells // 4, 0))
        assert abs(replay.cursor - STEPS // 4) <= STEPS // cells + 1
        assert not replay.playing
        await pilot.click(TransportLine, offset=(1, 0))
        assert replay.playing


async def test_the_line_marks_what_happened(recorded):
    app, _, _ = opened(recorded)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        line = app.screen.query_one(TransportLine)
        marks = line._find_marks(line._track[1])
        expected = dict.fromkeys(CLIPS, "clip") | {BAD: "nonfinite", MARK: "mark"}
        for step, kind in (expected | {WORSE: "spike"}).items():
            assert marks[line.cell_of(step)] == kind
        text = text_of(app).splitlines()[-2]
        for sign in (app.glyphs.failed, app.glyphs.point, app.glyphs.ascending, app.glyphs.mark):
            assert sign in text


async def test_typing_and_panels_keep_their_keys(recorded):
    app, replay, _ = opened(recorded)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        tab = app.screen._tab
        await press(pilot, "ctrl+right")
        assert app.screen._tab == tab + 1
        assert replay.cursor == STEPS
        await press(pilot, "slash", *"query", "left", "home", "b")
        assert replay.cursor == STEPS
        await press(pilot, "escape", "left")
        assert replay.cursor == STEPS - 1


async def test_a_search_without_a_match_is_reported(recorded, tmp_path):
    record_run(tmp_path, 50)
    app, replay, _ = opened(tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        for key, message in (("c", "no clip event"), ("i", "no non-finite"), ("z", "no spike")):
            await press(pilot, "home", key)
            assert message in text_of(app)
            assert replay.cursor == 0


async def test_a_living_run_is_followed(tmp_path):
    recorder = record_run(tmp_path, 100, end="")
    app, replay, clock = opened(tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        assert "following" in text_of(app)
        assert replay.cursor == 100
        values = step_row(1, 1e-3, 0.5, 50)
        recorder.record(StepRecord(101, 1.7e9 + 6, "", ((0, values),)))
        assert recorder.flush(240)
        await_commit(tmp_path, 101)
        clock.now += 2
        app.draw_frame()
        assert replay.cursor == 101
        await press(pilot, "left")
        recorder.record(StepRecord(102, 1.7e9 + 6, "", ((0, values),)))
        assert recorder.flush(240)
        await_commit(tmp_path, 102)
        clock.now += 2
        app.draw_frame()
        assert (replay.cursor, replay.last_step) == (100, 102)
        for keys, follows in (("end", True), ("space", False), ("space", True)):
            await press(pilot, keys)
            assert replay.follows is follows
    recorder.end("stopped")
    recorder.close(240)


def await_commit(directory, step):
    deadline = time.monotonic() + 240
    while StoredHistory(directory).last_step < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def test_the_help_lists_the_keys_of_time(recorded):
    app, _, _ = opened(recorded, start_mode="help")
    async with app.run_test(size=(200, 60)) as pilot:
        await settle(pilot)
        assert "Looking back" in text_of(app)
        assert "To the next non-finite value" in text_of(app)


async def test_the_keys_of_time_come_first_and_those_of_training_not_at_all(recorded):
    app = ReplayApp(ReplaySession(recorded))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        last = text_of(app).splitlines()[-1]
        for key in ("c Clip", "i nan/inf", "z Spike", "b Mark"):
            assert key in last
        for key in ("p Phase", "t Throttle"):
            assert key not in last
        await pilot.press("t")
        await settle(pilot)
        assert len(app.screen_stack) == 1, "it asks for a speed of training"


async def test_before_the_first_step_nothing_is_left_of_a_later_one(recorded):
    app = ReplayApp(ReplaySession(recorded))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        assert "Gradients  total" in text_of(app)
        await pilot.press("home")
        await settle(pilot)
        assert "Gradients  total" not in text_of(app)
        assert "of 6 parameters" in text_of(app)
