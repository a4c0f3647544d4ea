from __future__ import annotations

import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.history.test_series import check_window, series
from tui_trainer.history.records import StepRecord
from tui_trainer.history.series import MemorySeries
from tui_trainer.history.sync import apply_rows, rows_since
from tui_trainer.protocol.events import Clip, LogLine, Notice, TextSample
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import Column, RunInfo, Table
from tui_trainer.record.sink_items import (
    InfoChanged,
    ItemsDropped,
    RowRecorded,
    RunEnded,
    StepRecorded,
)
from tui_trainer.store.events import StoredEvents
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.schema import STORE_FILE, StoreError, open_for_writing
from tui_trainer.store.writer import StoreWriter

TABLES = (
    Table(0, "step", tuple(Column(f"c{i}") for i in range(3))),
    Table(1, "grad_norm", tuple(Column(f"p{i}") for i in range(35))),
)
INFO = RunInfo("quiet-otter", "gpt", tables=TABLES)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def stepped(step, *rows, when=0.0):
    return StepRecorded(StepRecord(int(step), when, "", tuple(enumerate(rows))))


COLUMNS = np.arange(35, dtype=np.float32)


def wide(step):
    return COLUMNS + np.float32(step)


def write(directory, steps, values, commits=7, close=True):
    clock = Clock()
    sink = StoreWriter(directory, clock=clock)
    sink.take([InfoChanged(INFO)], Status())
    for part in np.array_split(np.arange(len(steps)), commits):
        clock.now += 1
        items = [stepped(steps[i], values[i], wide(steps[i]), when=float(i)) for i in part]
        sink.take(items, Status(state="running", step=int(steps[part[-1]]) if len(part) else 0))
    if close:
        sink.close()
    return sink


@settings(max_examples=examples(25), suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 6000),
    commits=st.integers(1, 40),
    zooms=st.lists(
        st.tuples(st.floats(-0.1, 1.1), st.floats(0, 1.1), st.integers(1, 60)),
        min_size=1,
        max_size=5,
    ),
    cut=st.floats(0, 1),
)
def test_no_zoom_loses_an_extreme(tmp_path_factory, seed, count, commits, zooms, cut):
    directory = tmp_path_factory.mktemp("run")
    steps, values = series(seed, count)
    write(directory, steps, values, commits)
    history = StoredHistory(directory)
    table = history.tables[0]
    assert table.rows == count
    first, last = int(steps[0]), int(steps[-1])
    for place, width, buckets in zooms:
        start = int(first + place * (last - first))
        check_window(table, steps, values, start, int(start + width * (last - first)), buckets)
    check_window(table, steps, values, first, last + 1, 40)
    # As it was at an earlier step: nothing of what came later.
    now = int(first + cut * (last - first))
    history.seek(now)
    seen = steps <= now
    assert table.rows == seen.sum()
    check_window(table, steps[seen], values[seen], first, last + 1, 40)
    newest = table.latest()
    assert newest is not None
    np.testing.assert_equal(newest[1], values[seen][-1])
    np.testing.assert_equal(table.tail(9)[1], values[seen][-9:])
    np.testing.assert_equal(table.at(int(steps[seen.sum() // 2])), values[seen.sum() // 2])
    history.close()


def test_all_columns_are_read_back(tmp_path):
    steps, values = series(3, 5000)
    write(tmp_path, steps, values)
    table = StoredHistory(tmp_path).tables[1]
    window = table.window([34, 0, 16, 15], int(steps[0]), int(steps[-1]) + 1, 1)
    expected = np.float32([34, 0, 16, 15])
    np.testing.assert_equal(window.low[0], expected + np.float32(steps[0]))
    np.testing.assert_equal(window.high[0], expected + np.float32(steps[-1]))
    np.testing.assert_equal(table.at(int(steps[1000])), wide(steps[1000]))


def test_a_stored_table_serves_viewers(tmp_path):
    steps, values = series(4, 6000)
    write(tmp_path, steps, values)
    recorded = StoredHistory(tmp_path).tables[0]
    viewer = MemorySeries(TABLES[0])
    while viewer.rows < recorded.rows:
        apply_rows(viewer, rows_since(recorded, viewer.rows, 30_000))
    check_window(viewer, steps, values, int(steps[0]), int(steps[-1]) + 1, 30)


def test_events_lines_and_samples_are_kept(tmp_path):
    sink = StoreWriter(tmp_path)
    line = LogLine(0, 1.5, 3, "stdout", "ü\n")
    notice = Notice(0, 3, 1.5, "mark", "here")
    sample = TextSample(0, 3, "To", "be")
    ended = RunEnded(Status(state="finished", step=9))
    row = RowRecorded(0, 5, np.ones(3, np.float32), 0.0)
    sink.take([InfoChanged(INFO), line, notice, sample, row, ended], Status(state="running"))
    store = StoredHistory(tmp_path).store
    assert store.info() == INFO
    assert store.status() == ended.status
    assert store.query("SELECT text FROM log") == [("ü\n",)]
    assert store.query("SELECT step, kind FROM event") == [(3, "mark")]
    assert store.query("SELECT kind FROM artifact") == [("TextSample",)]
    sink.close()


def test_commands_are_found_among_thousands_of_clips(tmp_path):
    sink = StoreWriter(tmp_path)
    sink.take([InfoChanged(INFO), Notice(0, 1, 0.0, "command", "pause", who="me")], Status())
    sink.take([Clip(i, i, 0.0, 1.0, 2.0, 0.5) for i in range(1, 9000)], Status())
    sink.take([Notice(9000, 9000, 0.0, "mark", "here"), RunEnded(Status())], Status())
    sink.close()
    stored = StoredEvents(StoredHistory(tmp_path).store)
    events = stored.events(10_000, 2000)
    assert [e.text for e in events if isinstance(e, Notice)] == ["pause", "here"]
    assert [e.id for e in events] == [0, *range(7000, 9001)]
    assert [e.id for e in stored.events(3, 2000)] == [0, 1, 2, 3]


def test_escape_sequences_in_a_store_are_removed_when_read(tmp_path):
    hostile = "\x1b]0;owned\x07\x9b2J\x7f"
    sink = StoreWriter(tmp_path)  # without a recorder, which would have removed them
    info = msgspec.structs.replace(INFO, title=hostile)
    items = [
        Notice(0, 1, 0.0, "mark", hostile, who=hostile),
        LogLine(0, 0.0, 1, "stdout", hostile),
        TextSample(0, 1, hostile, hostile),
        RunEnded(Status(reason=hostile)),
    ]
    sink.take([InfoChanged(info), *items], Status())
    sink.close()
    store = StoredHistory(tmp_path).store
    events = StoredEvents(store)
    read = [store.info(), store.status()]
    read += [*events.events(9, 9), *events.log(9, 9), *events.artifacts(9, 9)]
    assert len(read) == 5
    for each in read:
        assert "owned" in repr(each)
        assert not {"\\x1b", "\\x07", "\\x9b", "\\x7f"} & set(re.findall(r"\\x..", repr(each)))


def test_rows_that_do_not_fit_are_counted(tmp_path):
    reports = []
    sink = StoreWriter(tmp_path, reports.append)
    three = np.ones(3, np.float32)
    items = [
        stepped(1, three),
        stepped(2, np.ones(4, np.float32)),
        stepped(1, three),
        ItemsDropped(5),
    ]
    sink.take([InfoChanged(INFO), *items, stepped(0, three)], Status())
    sink.close()
    assert reports == ["7 rows could not be recorded"]
    assert StoredHistory(tmp_path).tables[0].rows == 2


def test_a_second_writer_continues_where_the_first_stopped(tmp_path):
    steps, values = series(5, 3000)
    write(tmp_path, steps[:1700], values[:1700])
    write(tmp_path, steps[1700:], values[1700:])
    table = StoredHistory(tmp_path).tables[0]
    check_window(table, steps, values, int(steps[0]), int(steps[-1]) + 1, 33)


def test_the_reader_follows_a_running_run(tmp_path):
    steps, values = series(6, 4000)
    clock = Clock()
    sink = StoreWriter(tmp_path, clock=clock)
    sink.take([InfoChanged(INFO)], Status())
    history = StoredHistory(tmp_path)
    for part in np.array_split(np.arange(4000), 11):
        clock.now += 1
        sink.take([stepped(steps[i], values[i], wide(steps[i])) for i in part], Status())
        history.refresh()
        seen = part[-1] + 1
        assert history.last_step == steps[part[-1]]
        check_window(
            history.tables[0], steps[:seen], values[:seen], int(steps[0]), int(steps[-1]), 20
        )
    sink.close()


# ---------------------------------------------------------------- faults

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def check_resumes(tmp_path, break_it, mend):
    """Rows that were taken while recording was broken are there after `mend`."""
    steps, values = series(7, 600)
    reports, clock = [], Clock()
    sink = StoreWriter(tmp_path, reports.append, clock)
    sink.take([InfoChanged(INFO)], Status())
    break_it()
    clock.now += 100
    sink.take([stepped(s, v) for s, v in zip(steps[:300], values[:300], strict=True)], Status())
    assert reports
    assert "training continues" in reports[-1]
    mend()
    clock.now += 100
    sink.take([stepped(s, v) for s, v in zip(steps[300:], values[300:], strict=True)], Status())
    sink.close()
    assert reports[-1] == ""
    table = StoredHistory(tmp_path).tables[0]
    assert table.rows == 600
    check_window(table, steps, values, int(steps[0]), int(steps[-1]) + 1, 10)


def test_a_full_disk_is_reported_and_recording_resumes(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    def mend():
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        check_resumes(tmp_path, fill, mend)
    finally:
        mend()
        signal.signal(signal.SIGXFSZ, handler)


def test_a_locked_store_is_reported_and_recording_resumes(tmp_path):
    other = []

    def lock():
        other.append(open_for_writing(tmp_path))
        other[0].execute("BEGIN EXCLUSIVE")

    check_resumes(tmp_path, lock, lambda: other[0].close())


@needs_permissions
def test_a_read_only_directory_is_reported_and_recording_starts_later(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o500)
    reports, clock = [], Clock()
    sink = StoreWriter(run, reports.append, clock)
    sink.take([InfoChanged(INFO), stepped(1, np.ones(3, np.float32))], Status())
    assert "not recording" in reports[-1]
    run.chmod(0o700)
    clock.now += 100
    sink.take([], Status())
    sink.close()
    assert reports[-1] == ""
    assert StoredHistory(run).tables[0].rows == 1
    run.chmod(0o500)
    assert StoredHistory(run).tables[0].rows == 1  # readable where nothing can be written
    run.chmod(0o700)


def test_a_missing_directory_does_not_stop_the_run(tmp_path):
    reports = []
    sink = StoreWriter(tmp_path / "nowhere", reports.append)
    sink.take([InfoChanged(INFO), stepped(1, np.ones(3, np.float32))], Status())
    sink.close()
    assert "not recording" in reports[-1]


def test_the_queue_for_a_slow_disk_is_bounded(tmp_path, monkeypatch):
    from tui_trainer.store import writer

    monkeypatch.setattr(writer, "MAX_WAITING_BYTES", 10_000)
    reports, clock = [], Clock()
    sink = StoreWriter(tmp_path / "later", reports.append, clock)
    sink.take([InfoChanged(INFO)], Status())
    sink.take([stepped(i, np.ones(3, np.float32)) for i in range(1000)], Status())
    (tmp_path / "later").mkdir()
    clock.now += 100
    sink.take([], Status())
    sink.close()
    rows = StoredHistory(tmp_path / "later").tables[0].rows
    assert 100 < rows < 200
    assert reports[-1] == f"{1000 - rows} rows could not be recorded"


def test_clips_are_dropped_first_and_commands_never(tmp_path, monkeypatch):
    from tui_trainer.store import events

    monkeypatch.setattr(events, "MAX_WAITING", 100)
    reports, clock = [], Clock()
    sink = StoreWriter(tmp_path / "later", reports.append, clock)
    sink.take([InfoChanged(INFO)], Status())
    sink.take([Clip(i, i, 0.0, 1.0, 2.0, 0.5) for i in range(90)], Status())
    sink.take([LogLine(i, 0.0, i, "stdout", "x") for i in range(60)], Status())
    sink.take([Notice(90 + i, i, 0.0, "command", "pause") for i in range(70)], Status())
    sink.take([LogLine(60, 0.0, 60, "stdout", "late"), TextSample(0, 1, "To", "be")], Status())
    sink.take([Clip(160, 160, 0.0, 1.0, 2.0, 0.5)], Status())
    (tmp_path / "later").mkdir()
    clock.now += 100
    sink.take([], Status())
    assert reports[-1] == "91 clips, 1 line, 1 sample could not be recorded"
    sink.close()
    stored = StoredEvents(StoredHistory(tmp_path / "later").store)
    kept = stored.events(1000, 1000)
    assert [event.id for event in kept] == list(range(90, 160))
    assert len(stored.log(1000, 1000)) == 60
    assert stored.artifacts(1000, 10) == ()


def test_a_damaged_store_is_renamed_and_a_new_one_started(tmp_path):
    steps, values = series(8, 2000)
    write(tmp_path, steps, values)
    path = tmp_path / STORE_FILE
    path.write_bytes(b"not a database at all" * 1000)
    reports = []
    sink = StoreWriter(tmp_path, reports.append)
    sink.take([InfoChanged(INFO), stepped(1, np.ones(3, np.float32))], Status())
    sink.commit()
    sink.close()
    assert "the recording was damaged" in reports[-1]
    assert StoredHistory(tmp_path).tables[0].rows == 1
    assert [p for p in tmp_path.iterdir() if p.name.startswith("damaged-")]


def test_an_item_that_cannot_be_written_does_not_count_as_damage(tmp_path):
    reports, clock = [], Clock()
    sink = StoreWriter(tmp_path, reports.append, clock)
    sink.take([InfoChanged(INFO), stepped(1, np.ones(3, np.float32))], Status())
    clock.now += 1
    sink.take([LogLine(0, 0.0, 1, "stdout", "\ud800")], Status())  # UnicodeEncodeError
    assert "not recording" in reports[-1]
    sink.close()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("damaged-")]
    assert StoredHistory(tmp_path).tables[0].rows == 1


def test_a_tail_that_cannot_be_decoded_counts_as_damage(tmp_path):
    reports, clock = [], Clock()
    sink = StoreWriter(tmp_path, reports.append, clock)
    sink.take([InfoChanged(INFO), stepped(1, np.ones(3, np.float32))], Status())
    with sqlite3.connect(tmp_path / STORE_FILE) as connection:
        connection.execute("UPDATE tail SET data = 'none'")
    connection.close()
    clock.now += 1
    sink.take([stepped(i, np.ones(3, np.float32)) for i in range(2, 600)], Status())
    sink.close()
    assert "the recording was damaged" in reports[-1]
    assert StoredHistory(tmp_path).tables[0].rows == 599


def test_databases_set_aside_in_one_second_are_all_kept_and_not_without_end(tmp_path, monkeypatch):
    from tui_trainer.store import writer

    monkeypatch.setattr(writer.time, "strftime", lambda form: "20260101-120000")
    reports, clock = [], Clock()
    sink = StoreWriter(tmp_path, reports.append, clock)
    for _ in range(writer.MAX_SET_ASIDE + 3):
        clock.now += 100
        (tmp_path / STORE_FILE).write_bytes(b"not a database at all" * 1000)
        sink._disconnect()
        sink.commit()
    assert "not recording" in reports[-1]
    kept = [p for p in tmp_path.iterdir() if p.name.startswith("damaged-")]
    assert len(kept) == writer.MAX_SET_ASIDE
    sink.close()


@pytest.mark.parametrize("whole", [True, False])
def test_a_store_damaged_while_written_is_replaced_with_the_recent_items(
    tmp_path, monkeypatch, whole
):
    from tui_trainer.store import writer

    if not whole:
        monkeypatch.setattr(writer, "RECENT_BYTES", 300_000)
    steps, values = series(11, 3000)
    reports, clock = [], Clock()
    sink = StoreWriter(tmp_path, reports.append, clock)
    sink.take([InfoChanged(INFO)], Status())
    for part in np.array_split(np.arange(3000), 30):
        clock.now += 1
        items = [stepped(steps[i], values[i], wide(steps[i]), when=float(i)) for i in part]
        sink.take(items, Status(state="running", step=int(steps[part[-1]])))
        if part[0] == 1500:
            noise = np.random.default_rng(1).bytes
            for name in (STORE_FILE, STORE_FILE + "-wal"):
                path = tmp_path / name
                path.write_bytes(noise(path.stat().st_size))
            sink._disconnect()  # as a page that is no longer in SQLite's own memory
    sink.close()
    assert "the recording was damaged" in reports[-1]
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("damaged-")]) >= 1
    held = StoredHistory(tmp_path)
    table = held.tables[0]
    assert (table.rows == 3000) is whole
    assert table.rows > 1500  # more than what came after
    kept = slice(3000 - table.rows, None)
    check_window(table, steps[kept], values[kept], table.first_step, int(steps[-1]) + 1, 20)
    from tui_trainer.store.recorded_items import replay_items

    replayed = [item.record.step for item in replay_items(held) if isinstance(item, StepRecorded)]
    assert replayed == [int(step) for step in steps[kept]]


@pytest.mark.parametrize("seed", range(6))
def test_corrupt_pages_never_stop_the_reader(tmp_path, seed):
    steps, values = series(9, 6000)
    write(tmp_path, steps, values)
    path = tmp_path / STORE_FILE
    data = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for _ in range(3):
        page = int(random.integers(1, len(data) // 4096)) * 4096
        data[page : page + 4096] = random.bytes(4096)
    path.write_bytes(data)
    history = StoredHistory(tmp_path)  # its first page is whole, so it opens
    assert history.tables
    for table in history.tables.values():
        for buckets in (1, 50, 400):
            window = table.window([0], int(steps[0]), int(steps[-1]) + 1, buckets)
            assert window.low.shape == (buckets, 1)
        table.latest()
        table.tail(100)
        for step in range(0, int(steps[-1]), 97):
            table.at(step)
        for row in range(0, table.rows, 500):
            rows_since(table, row, 10_000)


def test_a_store_of_another_version_is_unchanged(tmp_path):
    open_for_writing(tmp_path).execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="another version of tui-trainer"):
        StoredHistory(tmp_path)
    reports = []
    sink = StoreWriter(tmp_path, reports.append)
    sink.take([InfoChanged(INFO)], Status())
    assert "another version of tui-trainer" in reports[-1]
    with pytest.raises(StoreError, match="nothing was recorded"):
        StoredHistory(tmp_path / "nowhere")


# ---------------------------------------------------------------- killed


def test_rows_are_committed_within_half_a_second(tmp_path):
    clock = Clock()
    sink = StoreWriter(tmp_path, clock=clock)
    sink.take([InfoChanged(INFO)], Status())
    clock.now = 0.1
    sink.take([stepped(1, np.ones(3, np.float32))], Status())
    clock.now = 0.5
    sink.take([], Status())  # a SinkThread calls it every half second at least
    assert StoredHistory(tmp_path).tables[0].rows == 1
    sink.close()


def test_nothing_is_written_while_nothing_changes(tmp_path):
    clock = Clock()
    sink = StoreWriter(tmp_path, clock=clock)
    sink.take([InfoChanged(INFO), stepped(1, np.ones(3, np.float32))], Status(step=1))
    journal = tmp_path / f"{STORE_FILE}-wal"
    before = journal.stat().st_size
    for state, writes in (("starting", False), ("paused", True), ("paused", False)):
        clock.now += 1
        sink.take([], Status(state=state, step=1))
        assert (journal.stat().st_size > before) is writes
        before = journal.stat().st_size
    sink.close()


WRITERS = """
import os, sys, time
import numpy as np
from tests.store.test_store import INFO, stepped, wide
from tui_trainer.protocol.messages import Status
from tui_trainer.record.sink_thread import SinkThread
from tui_trainer.record.sink_items import InfoChanged, StepRecorded
from tui_trainer.store.writer import StoreWriter

class ReportingWriter(StoreWriter):
    def take(self, items, status):
        steps = [item.record.step for item in items if isinstance(item, StepRecorded)]
        self.newest = max(steps, default=self.newest)
        super().take(items, status)

    def commit(self):
        done = super().commit()
        if done:
            print(self.newest, file=self.report)
        return done

def work(place):
    writer = ReportingWriter(place)
    writer.report, writer.newest = open(os.path.join(place, "report"), "w", buffering=1), 0
    def failed(sink, fault):
        print("fault", fault, file=writer.report)
    thread = SinkThread(writer, Status, failed)
    thread.put([InfoChanged(INFO)])
    step, end = 0, time.monotonic() + 300  # should nobody be left to kill it
    while time.monotonic() < end:
        step += 1
        thread.put([stepped(step, np.full(3, step, np.float32), wide(step))])
        time.sleep(0.008)
    os._exit(0)

for place in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        work(place)
    print(child, flush=True)
for _ in sys.argv[1:]:
    os.wait()
"""
KILLS = int(os.environ.get("TUI_TRAINER_TEST_KILLS", "60"))
AT_ONCE = 20


@pytest.mark.parametrize("batch", range(-(-KILLS // AT_ONCE)))
@pytest.mark.slow
def test_a_killed_run_loses_nothing_that_was_committed(tmp_path, batch):
    """Writers are killed at random moments, many of them at a time."""
    random = np.random.default_rng(batch)
    places = [tmp_path / str(number) for number in range(AT_ONCE)]
    for place in places:
        place.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", WRITERS, *map(str, places)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        children = [int(parent.stdout.readline()) for _ in places]
        moments = time.monotonic() + np.sort(random.uniform(0.0, 2.0, AT_ONCE))
        for child, moment in zip(children, moments, strict=True):
            time.sleep(max(0.0, moment - time.monotonic()))
            os.kill(child, signal.SIGKILL)
    for place in places:
        check_killed(place, random)


def check_killed(place, random):
    """The store of a killed writer is whole, and holds every row that it had committed."""
    report = place / "report"
    lines = report.read_text().split("\n")[:-1] if report.exists() else []
    assert not [line for line in lines if line.startswith("fault")]
    try:
        history = StoredHistory(place)
    except StoreError:
        assert not lines
        return
    for table in history.tables.values():
        assert table.rows >= max(map(int, lines), default=0)
        for step in random.integers(1, table.rows + 1, 20) if table.rows else ():
            expected = np.full(3, step) if table.columns == 3 else wide(step)
            np.testing.assert_equal(table.at(int(step)), expected)
    history.close()
    with sqlite3.connect(place / STORE_FILE) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
