"""Runs compared: distinguishable charts, and the differences of their configurations."""

from __future__ import annotations

import json
import re
import shutil
import threading

import msgspec
import numpy as np
import pytest

from tests.cli.calling import assert_refused, call
from tests.recorded_runs import STEPS, directory, fingerprint, home
from tests.ui.screens import SIZES, settle, text_of, until
from tui_trainer.cli.commands.compare import as_lines
from tui_trainer.comparison import compared_runs
from tui_trainer.comparison.compared_runs import ComparedRun, ComparedValue, differences, outcome
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.runs.liveness import inspect_run
from tui_trainer.store.database import Store
from tui_trainer.ui.compare_app import CompareApp
from tui_trainer.ui.glyphs import UNICODE
from tui_trainer.ui.panels.runs import ASCII_RUN_MARKERS, RUN_MARKERS, distinct_parts


def losses(name):
    lines = [json.loads(line) for line in (home() / f"{name}.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["type"] == "step"}


def compared(*names):
    return [ComparedRun(inspect_run(directory(name))) for name in names]


def by_name(lines):
    return {line.name: line.values for line in lines}


def test_only_differences_are_listed():
    runs = compared("calm", "eager")
    assert by_name(differences(runs)) == {"learning_rate": (0.001, 0.02)}
    ends = by_name(outcome(runs))
    assert ends["steps"] == (STEPS, STEPS)
    assert ends["state"] == ("finished", "finished")
    for place, name in enumerate(("calm", "eager")):
        measured = [line["loss"] for line in losses(name).values()]
        assert np.float32(ends["loss, last"][place]) == np.float32(measured[-1])
        assert np.float32(ends["loss, best"][place]) == np.float32(min(measured))
        norms = [line["grad_norm_preclip"] for line in losses(name).values()]
        assert np.float32(ends["gradient norm, highest"][place]) == np.float32(max(norms))


def test_kinds_of_values_are_not_mixed_up(monkeypatch):
    infos = [RunInfo("a", "gpt", configuration={"x": 1}), RunInfo("b", "gpt")]
    infos.append(RunInfo("c", "gpt", configuration={"x": True}))
    runs = compared("calm", "calm", "calm")
    for run, info in zip(runs, infos, strict=True):
        run.info = info
    assert differences(runs) == [ComparedValue("x", (1, None, True))]


def test_curves_by_step_and_by_time_hold_the_same_extremes():
    (run,) = compared("calm")
    measured = np.float32([line["loss"] for line in losses("calm").values()])
    steps, seconds = run.length
    for stop, by_time in ((steps, False), (seconds, True)):
        for buckets in (1, 7, 200):
            curve = run.curve("loss", stop, buckets, by_time)
            assert np.nanmin(curve.low) == measured.min()
            assert np.nanmax(curve.high) == measured.max()
            assert len(curve.low) == buckets
    times = run.seconds_at(np.arange(1, STEPS + 1))
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    assert run.curve("loss", steps, 10).filled.all()


def test_off_a_terminal_it_is_a_table_or_json():
    before = [fingerprint(directory(name)) for name in ("calm", "eager")]
    done = call("compare", "calm", "eager", cwd=home())
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert rows["learning_rate"].split() == ["learning_rate", "0.001", "0.02"]
    assert "loss, last" in rows
    made = json.loads(call("compare", "calm", "eager", "--json", cwd=home()).stdout)
    assert made["runs"] == ["calm", "eager"]
    assert made["differences"] == {"learning_rate": [0.001, 0.02]}
    assert [fingerprint(directory(name)) for name in ("calm", "eager")] == before


def test_a_long_option_has_a_line_for_each_run_and_does_not_widen_the_table():
    runs = compared("calm", "eager")
    commands = [f"tui-trainer gpt --name {name} " + "--data folder " * 9 for name in ("a", "b")]
    for run, text in zip(runs, commands, strict=True):
        run.info = msgspec.structs.replace(run.info, configuration={"data": text.strip()})
    lines = [line.plain for line in as_lines(runs)]
    at = lines.index("data")
    assert [line.split(maxsplit=1) for line in lines[at + 1 : at + 3]] == [
        [name, text.strip()] for name, text in zip(("calm", "eager"), commands, strict=True)
    ]
    assert max(map(len, lines[:at])) < 90


def test_where_the_runs_part_is_printed():
    """They differ in the learning rate alone, so they have the same loss in the first step."""
    text = call("compare", "calm", "eager", cwd=home()).stdout
    assert "calm and eager first differ at step 1, in step: learning rate" in text
    assert "further quantities differ at step 1" in text
    made = json.loads(call("compare", "calm", "eager", "--json", cwd=home()).stdout)
    (divergence,) = made["divergence"]
    assert divergence["runs"] == ["calm", "eager"]
    first = divergence["first"]
    assert (first["step"], first["phase"], first["column"]) == (1, "step", "learning_rate")
    rates = [losses(name)[1]["lr"] for name in ("calm", "eager")]
    assert [np.float32(v) for v in first["values"]] == [np.float32(rate) for rate in rates]
    assert [each["step"] for each in first["around"]] == [1, 2, 3]
    tolerant = call("compare", "calm", "eager", "--json", "--tolerance", "1e6", cwd=home())
    assert json.loads(tolerant.stdout)["divergence"][0]["first"] is None
    assert_refused(call("compare", "calm", "eager", "--tolerance", "-1", cwd=home()), "tolerance")


async def read(pilot):
    """Until the runs have been read, and drawn."""

    def all_read():
        return not getattr(pilot.app.screen, "reading", 0)

    await settle(pilot)
    while not all_read():  # charts that get another width read again
        await until(pilot, all_read, "the runs are read")
        await settle(pilot)


async def test_where_the_runs_part_is_on_the_screen():
    app = CompareApp(compared("calm", "eager"))
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.divergence, "the runs are compared")
        await read(pilot)
        text = text_of(app)
        assert "first difference" in text
        assert re.search(r"at step +1 +1", text)
        assert re.search(r"in phase +step +step", text)
        assert re.search(r"learning rate +[\d.e-]+ +[\d.e-]+", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "two runs or more"),
        (("calm",), "two runs or more"),
        (("calm", "calm"), "two runs or more"),
        (("calm", "missing"), "there is no run missing"),
    ],
)
def test_refused_comparisons(arguments, message):
    assert_refused(call("compare", *arguments, cwd=home()), message)


def test_too_many(tmp_path):
    for number in range(compared_runs.MAX_RUNS + 1):
        shutil.copytree(directory("calm"), tmp_path / "runs" / f"run{number}")
    (tmp_path / "runs").chmod(0o700)
    names = [f"run{number}" for number in range(compared_runs.MAX_RUNS + 1)]
    assert_refused(call("compare", *names, cwd=tmp_path), "cannot be distinguished")
    fewer = call("compare", *names[1:], cwd=tmp_path)
    assert fewer.returncode == 0
    assert "set up alike" not in fewer.stdout or "differently" not in fewer.stdout


# ---------------------------------------------------------------- on the screen


@pytest.mark.parametrize("size", SIZES)
async def test_runs_are_distinguishable_without_colour(size):
    app = CompareApp(compared("calm", "eager"))
    async with app.run_test(size=size) as pilot:
        await read(pilot)
        text = text_of(app)
        assert "● calm" in text
        assert "◆ eager" in text
        assert "by step" in text
        chart = "\n".join(text.splitlines()[3:])
        assert chart.count(RUN_MARKERS[0]) > 2
        assert chart.count(RUN_MARKERS[1]) > 2
        await pilot.press("left" if size[0] < 100 else "down")
        await read(pilot)
        text = text_of(app)
        assert "learning_rate" in text
        assert "0.02" in text
        assert "configuration" in text


async def test_keys_align_smooth_and_scale():
    app = CompareApp(compared("calm", "eager"))
    async with app.run_test(size=(120, 40)) as pilot:
        await read(pilot)
        seen = {text_of(app)}
        for key, message in (("t", "seconds"), ("m", "by time"), ("l", "log"), ("t", "by step")):
            await pilot.press(key)
            await read(pilot)
            assert message in text_of(app)
            assert text_of(app) not in seen
            seen.add(text_of(app))
        await pilot.press("question_mark")
        await read(pilot)
        assert "Align the runs by step or by time" in text_of(app)
        await pilot.press("1")  # of one run there is no dashboard here
        await pilot.press("escape")
        await read(pilot)
        assert app.current_mode == "compare"
        await pilot.press("q")
        await read(pilot)
    assert app.return_code == 0


async def test_ascii_only():
    app = CompareApp(compared("calm", "eager"), ascii=True)
    async with app.run_test(size=(80, 24)) as pilot:
        await read(pilot)
        assert text_of(app).isascii()
        assert f"{ASCII_RUN_MARKERS[1]} eager" in text_of(app)


async def test_runs_without_a_series(tmp_path):
    from tui_trainer.record.recorder import Recorder
    from tui_trainer.store.writer import StoreWriter

    recorder = Recorder(RunInfo("empty", "script"))
    recorder.subscribe(StoreWriter(tmp_path))
    recorder.end("crashed", "at once")
    assert recorder.close(240)
    (calm,) = compared("calm")
    run = inspect_run(directory("calm"))
    empty = ComparedRun(run.__class__("empty", tmp_path, "crashed", run.reported))
    app = CompareApp([calm, empty])
    async with app.run_test(size=(120, 40)) as pilot:
        await read(pilot)
        assert "◆ empty" in text_of(app)
        assert "–" in text_of(app)


def test_only_the_parts_that_differ_are_shown_of_long_settings():
    commands = ["train.py --lr 1e-3 --seed 1", "train.py --lr 1e-2 --seed 1"]
    assert distinct_parts(commands) == ["…1e-3…", "…1e-2…"]
    assert distinct_parts(["a", "b"]) == ["a", "b"]
    assert distinct_parts(["x y", "x y z"]) == ["…y", "…y z"]


async def test_four_runs_at_120_columns_show_whole_numbers():
    app = CompareApp(compared("calm", "eager", "calm", "eager"), frames_per_second=0.01)
    async with app.run_test(size=(120, 40)) as pilot:
        await read(pilot)
        text = text_of(app)
        assert text.count("finished") >= 4
        state = next(line for line in text.splitlines() if "finished" in line)
        assert state.count("finished") == 4
        losses = next(line for line in text.splitlines() if "loss, last" in line)
        assert "…" not in losses.rpartition("loss, last")[2]


async def test_skipped_iterations_are_marked_and_counted():
    runs = compared("calm", "eager")
    assert not any(run.skipped for run in runs)
    assert "skipped iterations" not in by_name(outcome(runs))
    runs[0].skipped = [STEPS // 3 + 2] * 3
    assert by_name(outcome(runs))["skipped iterations"] == (3, None)
    app = CompareApp(runs)
    async with app.run_test(size=(120, 40)) as pilot:
        await read(pilot)
        axis = next(line for line in text_of(app).splitlines() if line.lstrip().startswith("step"))
        assert UNICODE.failed in axis


async def test_the_event_loop_reads_no_database(monkeypatch):
    readers = set()

    def stream(store, query, *values, unpatched=Store.stream):
        readers.add(threading.current_thread().name)
        yield from unpatched(store, query, *values)

    runs = compared("calm", "eager")
    monkeypatch.setattr(Store, "stream", stream)
    app = CompareApp(runs)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.screen.divergence, "the runs are compared")
        await read(pilot)
        for key in ("t", "m", "l", "t"):
            await pilot.press(key)
            await read(pilot)
        assert readers
        assert threading.main_thread().name not in readers
