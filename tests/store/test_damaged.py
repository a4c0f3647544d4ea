"""Damaged recordings: what can be read is shown, the rest is named in one sentence, and no viewer
crashes."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections import Counter

import numpy as np
import pytest

from tests.store.test_recorded_items import train
from tui_trainer.cli.commands.compare import compare
from tui_trainer.cli.commands.export import export
from tui_trainer.cli.commands.report import report
from tui_trainer.cli.commands.show import show
from tui_trainer.cli.errors import FAULT, CommandError
from tui_trainer.client.replay import ReplaySession
from tui_trainer.config.run_spec import RunSpec, RunState, write_spec, write_state
from tui_trainer.protocol import schema
from tui_trainer.protocol.actions import Pause
from tui_trainer.protocol.events import ConfusionMatrix, ImageSample
from tui_trainer.protocol.schema import AttentionInfo, Column, RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.schema import STORE_FILE, StoreError
from tui_trainer.store.writer import StoreWriter

STEPS = 1100
SEEDS = int(os.environ.get("TUI_TRAINER_TEST_DAMAGES", "8"))


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Two runs of 1,100 steps with events, lines, samples of every kind, narrow and wide tables."""
    runs = tmp_path_factory.mktemp("runs")
    runs.chmod(0o700)
    for name in ("calm", "eager"):
        record(runs / name)
    return runs


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The same of 540 steps: one full chunk, and a tail."""
    runs = tmp_path_factory.mktemp("short")
    runs.chmod(0o700)
    for name in ("calm", "eager"):
        record(runs / name, 540)
    return runs


def record(place, steps=STEPS):
    title, configuration = "gpt · small", {"layers": 2, "text": "ü"}
    write_spec(RunSpec(name=place.name, directory=str(place), task="gpt", title=title))
    info = RunInfo(place.name, "gpt", title, configuration=configuration, total_steps=steps)
    recorder = Recorder(info)
    recorder.subscribe(StoreWriter(place))
    layers = [AttentionInfo(f"blocks.{i}", "fused", "w", "w", "w") for i in range(2)]
    recorder.describe(attention=tuple(layers))
    names = [f"{each.layer}.{name}" for each in layers for name in schema.ATTENTION_STATISTICS]
    attention = recorder.new_table(schema.ATTENTION, [Column(name) for name in names])
    recorder.row(attention, 0, np.linspace(0, 1, len(names), dtype=np.float32))
    train(recorder, steps)
    recorder.artifact(ConfusionMatrix(0, steps, ("a", "b"), ((3, 1), (0, 4))))
    recorder.artifact(ImageSample(0, steps, 2, 2, bytes(24), ("a", "b"), (0.5, 1.0), ("a", "a")))
    recorder.notice("mark", "look here")
    recorder.end("finished", "all steps made")
    assert recorder.close(240)
    state = RunState(
        name=place.name, task="gpt", title=title, state="finished", step=steps, total_steps=steps,
        started_at=1.7e9, written_at=time.time(), reason="all steps made", loss=0.5,
    )  # fmt: skip
    write_state(place, state)


@pytest.fixture
def runs(intact, tmp_path):
    """A copy for a test to damage."""
    copied = shutil.copytree(intact, tmp_path / "runs")
    copied.chmod(0o700)
    return copied


def change(runs, *statements):
    with sqlite3.connect(runs / "calm" / STORE_FILE) as connection:
        for statement, *values in statements:
            connection.execute(statement, values)
    connection.close()


TEXTS, FILES = ("show", "json", "compare"), ("report", "csv", "jsonl")


def run_commands(runs, tmp_path, capsys, names=(*TEXTS, *FILES)):
    """(exit status, stdout, stderr) of each command that reads a recording; the status is None for
    one that refuses, with its message."""
    results = {}
    calls = {
        "show": lambda: show("calm", once=True, runs_dir=runs),
        "json": lambda: show("calm", json=True, runs_dir=runs),
        "report": lambda: report("calm", output=tmp_path / "calm.html", runs_dir=runs),
        "compare": lambda: compare("calm", "eager", plain=True, runs_dir=runs),
        "csv": lambda: exported("csv", runs, tmp_path / "csv"),
        "jsonl": lambda: exported("jsonl", runs, tmp_path / "calm.jsonl"),
    }
    for name in names:
        try:
            status = calls[name]()
        except CommandError as error:
            results[name] = (None, "", error.message)
            continue
        out = capsys.readouterr()
        results[name] = (status, out.out, out.err)
    return results


def exported(format, runs, output):
    return export("calm", format=format, output=output, overwrite=True, runs_dir=runs)


def look_back(runs):
    """Read a recording as its screens do; returns the last snapshot."""
    replay = ReplaySession(runs / "calm")
    for step in (0, 7, 600, STEPS // 2, 10**9):
        replay.seek(step)
        seen = replay.poll()
        for table in seen.history.tables.values():
            for buckets in (1, 400):
                window = table.window([0], 0, STEPS, buckets)
                assert window.low.shape == (buckets, 1)
            table.latest()
            table.tail(100)
            table.at(step)
        for kind in ("clip", "mark", "nonfinite"):
            replay.moments.places(kind, replay.last_step, 80)
            replay.moments.next_event(kind, step)
    replay.spikes()
    replay.send(Pause())
    replay._refresh(0.0)
    seen = replay.poll()
    replay.close()
    return seen


def test_an_intact_recording_is_read_without_a_warning(runs, tmp_path, capsys):
    results = run_commands(runs, tmp_path, capsys)
    assert {name: status for name, (status, _, _) in results.items()} == dict.fromkeys(results, 0)
    assert not any(error for _, _, error in results.values())
    snapshot = look_back(runs)
    assert snapshot.link.message == ""
    assert Counter(type(each).__name__ for each in snapshot.artifacts) == {
        "TextSample": 20, "ConfusionMatrix": 1, "ImageSample": 1
    }  # fmt: skip


NOISE = b"\xff\x00noise"


@pytest.mark.parametrize(
    ("named", "statement"),
    [
        ("its last state", "UPDATE meta SET value = ? WHERE key = 'status'"),
        ("events", "UPDATE event SET data = ? WHERE id = 3"),
        ("events", "UPDATE event SET data = ? WHERE kind = 'mark'"),
        ("samples", "UPDATE artifact SET data = ? WHERE id = (SELECT max(id) FROM artifact)"),
        ("lines of output", "UPDATE log SET stream = ? WHERE id = (SELECT max(id) FROM log)"),
        ("tables", "UPDATE series SET description = ? WHERE id = 2"),
        ("measurements", "UPDATE tail SET data = ? WHERE series = 0 AND level = 0"),
        ("measurements", "UPDATE chunk SET seqs = ? WHERE id = 1"),
        ("times of steps", "UPDATE step_time SET data = ? WHERE id = 2"),
        ("the run's description", "UPDATE description SET data = ?"),
        ("the run's description", "UPDATE description SET data = ? WHERE seq > 0"),
    ],
)
def test_damaged_records_are_left_out_and_named(runs, tmp_path, capsys, named, statement):
    change(runs, (statement, NOISE))
    results = run_commands(runs, tmp_path, capsys)
    for name in ("show", "json", "report", "compare"):
        assert results[name][0] == 0, results[name]
    for name in ("csv", "jsonl"):
        assert results[name][0] in (0, FAULT), results[name]
        assert (named in results[name][2]) == (results[name][0] == FAULT), results[name]
    assert FAULT in (results["csv"][0], results["jsonl"][0]) or named in results["show"][1]
    assert "finished" in results["show"][1]
    assert "gpt · small" in results["show"][1]
    assert "<svg" in (tmp_path / "calm.html").read_text()
    assert len((tmp_path / "csv" / "steps.csv").read_text().splitlines()) > STEPS - 600
    snapshot = look_back(runs)
    assert snapshot.info.name == "calm"
    assert snapshot.status.state == "finished"
    assert len(snapshot.events) > 250
    assert len(snapshot.history.tables) == 6


def test_the_lines_after_a_damaged_piece_of_the_step_times_are_those_of_the_run(runs, tmp_path):
    exported("jsonl", runs, tmp_path / "whole.jsonl")
    change(runs, ("UPDATE step_time SET data = ? WHERE id = 2", NOISE))
    assert exported("jsonl", runs, tmp_path / "calm.jsonl") == FAULT
    whole = (tmp_path / "whole.jsonl").read_text().splitlines()
    kept = (tmp_path / "calm.jsonl").read_text().splitlines()
    assert 0 < len(whole) - len(kept) <= 512
    assert set(kept) < set(whole)


def test_a_run_without_description_and_state_is_described_by_its_files(runs):
    change(
        runs,
        ("UPDATE meta SET value = ?", NOISE),
        ("UPDATE description SET data = ?", NOISE),
    )
    snapshot = look_back(runs)
    assert (snapshot.info.name, snapshot.info.title) == ("calm", "gpt · small")
    assert (snapshot.status.state, snapshot.status.step) == ("finished", STEPS)
    assert snapshot.history.table(schema.STEP).rows == STEPS
    assert snapshot.link.message == (
        "part of the recording cannot be read: the run's description, its last state"
    )


def test_an_absurd_number_is_not_counted_up_to(runs, tmp_path, capsys):
    change(
        runs,
        ("UPDATE chunk SET number = ? WHERE id = 1", 2**60),
        ("UPDATE step_time SET id = ? WHERE id = (SELECT max(id) FROM step_time)", 2**60),
    )
    run_commands(runs, tmp_path, capsys)
    look_back(runs)


def test_a_run_whose_database_does_not_open_is_shown_by_its_files(runs, tmp_path, capsys):
    (runs / "calm" / STORE_FILE).write_bytes(b"no database" * 1000)
    results = run_commands(runs, tmp_path, capsys)
    assert results["show"][0] == results["json"][0] == 0
    assert "finished" in results["show"][1]
    assert "cannot be read" in results["show"][1]
    for name in ("report", "compare", "csv", "jsonl"):
        assert results[name][0] is None
        assert "cannot be read" in results[name][2]


MEASURED = [
    *[("description", "seq"), ("description", "data"), ("series", "id"), ("series", "description")],
    *[("step_time", name) for name in ("id", "last_seq", "last_step", "last_time", "data")],
    *[("chunk", name) for name in ("number", "last_step", "steps", "seqs")],
    *[("part", "data"), ("tail", "first"), ("tail", "data"), ("tail", "seqs")],
]
REPORTED = [
    [("event", "seq"), ("log", "seq"), ("artifact", "seq")],
    [("event", "step"), ("log", "step"), ("artifact", "step")],
    [("event", "kind"), ("log", "time"), ("artifact", "kind"), ("meta", "value")],
    [("event", "data"), ("log", "text"), ("artifact", "data")],
]
"""Columns of tables that are read independently of each other and of the measurements."""
KEYS = {"meta": "key", "tail": "first", "description": "seq", "part": "chunk"}


VALUES = (2**62, "text", float("inf"), -5, b"\x00", 0.5)


@pytest.mark.parametrize("turn", range(3))
def test_a_column_may_hold_a_value_of_any_type(short, tmp_path, capsys, turn):
    """SQLite stores a value of any type in any column: a damaged record may have any. In three
    turns each column holds an integer, a float, and text or bytes, and is read by half of the
    commands and then by the others."""
    runs = shutil.copytree(short, tmp_path / "runs")
    runs.chmod(0o700)
    path = runs / "calm" / STORE_FILE
    for number, each in enumerate(MEASURED):
        columns = [each, *REPORTED[number % len(REPORTED)]]
        value = VALUES[(turn + 3 * number) % len(VALUES)]
        path.unlink()
        shutil.copy(runs / "eager" / STORE_FILE, path)
        for table, column in columns:
            key = KEYS.get(table, "id")
            newest = f"SELECT max({key}) FROM {table}"
            update = f"UPDATE {table} SET {column} = ? WHERE {key} = ({newest})"
            with contextlib.suppress(sqlite3.IntegrityError):  # a primary key holds integers
                change(runs, (update, value))
        names = (TEXTS, FILES)[(turn + number) % 2]
        results = run_commands(runs, tmp_path, capsys, names)
        statuses = {status for status, _, _ in results.values()}
        assert statuses <= {0, FAULT}, (columns, results)
        look_back(runs)


def damage(path, seed):
    """One page of noise, or forty changed bytes; not in the first page, without which the database
    does not open."""
    random = np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    if seed % 2:
        page = int(random.integers(1, len(data) // 4096)) * 4096
        data[page : page + 4096] = random.bytes(4096)
    else:
        for place in random.integers(4096, len(data), 40):
            data[place] ^= int(random.integers(1, 256))
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(SEEDS // 2))
def test_damage_of_the_first_page_is_reported_in_a_sentence(runs, tmp_path, capsys, seed):
    """That page holds the schema: all may be readable, some, or nothing."""
    path = runs / "calm" / STORE_FILE
    random = np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    for place in random.integers(0 if seed % 2 else 100, 4096, 1 + seed):
        data[place] ^= int(random.integers(1, 256))
    path.write_bytes(data)
    results = run_commands(runs, tmp_path, capsys)
    for name in ("show", "json"):
        assert results[name][0] == 0, results[name]
    assert "finished" in results["show"][1]
    for name, (status, _, error) in results.items():
        assert status in (0, FAULT) or error, name


@pytest.mark.parametrize("seed", range(SEEDS))
def test_corrupt_pages_and_bytes_never_stop_a_reader(runs, tmp_path, capsys, seed):
    damage(runs / "calm" / STORE_FILE, seed)
    results = run_commands(runs, tmp_path, capsys)
    for name in ("show", "json", "report", "compare", "csv", "jsonl"):
        assert results[name][0] in (0, FAULT), results[name]
    assert "calm" in results["show"][1]
    assert "finished" in results["show"][1]
    try:
        history = StoredHistory(runs / "calm")
    except StoreError:
        pytest.fail("one page or forty bytes beyond the first page close the whole recording")
    assert history.tables
    seen = look_back(runs)
    rows = sum(table.rows for table in seen.history.tables.values())
    assert rows + len(seen.events) + len(seen.log) > STEPS  # the rest is there
