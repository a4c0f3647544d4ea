from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tui_trainer.history import MemoryHistory, MemorySeries
from tui_trainer.history.buckets import NAN, NEGATIVE, POSITIVE
from tui_trainer.history.sync import apply_rows, rows_since
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.messages import Rows
from tui_trainer.protocol.schema import Column, Table


def table(columns: int = 3, number: int = 0, name: str = "step") -> Table:
    return Table(number, name, tuple(Column(f"c{i}") for i in range(columns)))


def series(seed: int, count: int, columns: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Random steps with gaps and values with spikes, NaN and infinities."""
    random = np.random.default_rng(seed)
    steps = random.integers(0, 1000) + np.cumsum(random.integers(1, random.integers(2, 9), count))
    values = random.standard_normal((count, columns)).astype(np.float32)
    values[random.random((count, columns)) < 0.002] *= 1e6
    for odd in (np.nan, np.inf, -np.inf):
        values[random.random((count, columns)) < 0.003] = odd
    return steps.astype(np.int64), values


def fill(history: MemorySeries, steps: np.ndarray, values: np.ndarray) -> None:
    for step, row in zip(steps, values, strict=True):
        history.append(int(step), row)


def check_window(
    history: MemorySeries,
    steps: np.ndarray,
    values: np.ndarray,
    start: int,
    stop: int,
    buckets: int,
) -> None:
    """Every stretch agrees with the raw data of its steps."""
    columns = [2, 0]
    window = history.window(columns, start, stop, buckets)
    assert len(window.edges) == buckets + 1
    assert (np.diff(window.edges) >= 0).all()
    covered = 0
    for i, (low, high) in enumerate(zip(window.edges[:-1], window.edges[1:], strict=True)):
        inside = slice(*np.searchsorted(steps, (low, high)).tolist())
        count = inside.stop - inside.start
        covered += count
        assert window.filled[i] == bool(count)
        if not count:
            continue
        for place, column in enumerate(columns):
            raw = values[inside, column]
            finite = raw[np.isfinite(raw)]
            assert window.nonfinite[i, place] == (len(finite) < len(raw))
            flags = (
                NAN * bool(np.isnan(raw).any())
                | POSITIVE * bool(np.isposinf(raw).any())
                | NEGATIVE * bool(np.isneginf(raw).any())
            )
            assert window.flags[i, place] == flags
            last = window.last[i, place]
            assert last == raw[-1] or (np.isnan(last) and np.isnan(raw[-1]))
            if len(finite):
                assert window.low[i, place] == finite.min()
                assert window.high[i, place] == finite.max()
            else:
                assert np.isnan(window.low[i, place])
                assert np.isnan(window.high[i, place])
    asked = (steps >= start) & (steps < stop)
    assert covered >= asked.sum()
    if asked.any():
        assert window.edges[0] <= steps[asked][0]
        assert window.edges[-1] > steps[asked][-1]


@settings(max_examples=examples(60))
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 6000),
    entries=st.sampled_from([64, 128, 1024]),
    zooms=st.lists(
        st.tuples(st.floats(-0.1, 1.1), st.floats(0, 1.1), st.integers(1, 60)),
        min_size=1,
        max_size=6,
    ),
)
def test_no_window_loses_an_extreme(seed, count, entries, zooms):
    steps, values = series(seed, count)
    history = MemorySeries(table(), entries)
    fill(history, steps, values)
    first, last = (int(steps[0]), int(steps[-1])) if count else (0, 10)
    for place, width, buckets in zooms:
        start = int(first + place * (last - first))
        stop = int(start + width * (last - first))
        check_window(history, steps, values, start, stop, buckets)
    check_window(history, steps, values, first, last + 1, 40)
    check_window(history, steps, values, last - 30, last + 1, 40)


@settings(max_examples=examples(60))
@given(
    seed=st.integers(0, 2**32),
    pieces=st.lists(
        st.tuples(st.integers(1, 1500), st.integers(20, 40_000), st.booleans()),
        min_size=1,
        max_size=8,
    ),
    entries=st.tuples(st.sampled_from([64, 512]), st.sampled_from([64, 512])),
)
def test_a_viewer_sees_what_the_run_has(seed, pieces, entries):
    """Any interleaving of raw and summarised pieces, with a viewer that at times lags behind."""
    steps, values = series(seed, sum(count for count, _, _ in pieces))
    here, there = (MemorySeries(table(), size) for size in entries)
    done = 0
    for count, budget, catches_up in pieces:
        fill(here, steps[done : done + count], values[done : done + count])
        done += count
        for _ in range(10_000 if catches_up else 1):
            if there.rows == here.rows:
                break
            apply_rows(there, rows_since(here, there.rows, budget))
        seen = there.rows
        assert seen == done or not catches_up
        if seen:
            known = steps[:seen], values[:seen]
            last = int(known[0][-1])
            check_window(there, *known, int(steps[0]), last + 1, 37)
            check_window(there, *known, last - 40, last + 1, 25)
            newest = there.latest()
            assert newest is not None
            assert newest[0] == last
            np.testing.assert_equal(newest[1], known[1][-1])


def test_newest_rows_stay_raw():
    steps, values = series(1, 5000)
    history = MemorySeries(table(), 512)
    assert history.latest() is None
    assert history.at(10) is None
    fill(history, steps, values)
    assert (history.first_step, history.last_step) == (steps[0], steps[-1])
    tail_steps, tail = history.tail(100)
    np.testing.assert_equal(tail_steps, steps[-100:])
    np.testing.assert_equal(tail, values[-100:])
    assert len(history.tail(10_000)[0]) == 512
    np.testing.assert_equal(history.at(int(steps[-5])), values[-5])
    np.testing.assert_equal(history.at(int(steps[-1]) + 7), values[-1])
    assert history.at(int(steps[0]) - 1) is None
    row = np.searchsorted(steps, steps[100], "right") - 1
    found = history.at(int(steps[100]))
    assert any(np.array_equal(found, old, equal_nan=True) for old in values[row - 64 : row + 1])


def test_wrong_rows_are_refused():
    history = MemorySeries(table())
    history.append(5, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="comes after step 5"):
        history.append(4, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="3 columns"):
        history.append(6, np.zeros(4, np.float32))
    history.append(5, np.ones(3, np.float32))
    assert history.rows == 2


@functools.cache
def seven_hundred_rows() -> MemorySeries:
    history = MemorySeries(table())
    fill(history, *series(3, 700))
    return history


@settings(max_examples=examples(100))
@given(data=st.data())
def test_hostile_rows_raise_value_error_only(data):
    import msgspec

    here, there = seven_hundred_rows(), MemorySeries(table(), 64)
    for _ in range(3):
        piece = rows_since(here, there.rows, data.draw(st.sampled_from([200, 2000, 50_000])))
        noise = st.one_of(st.just(None), st.binary(max_size=64))
        changed = {
            name: drawn
            for name in ("steps", "values", "low", "high", "spans", "flags")
            if (drawn := data.draw(noise)) is not None
        }
        if data.draw(st.booleans()):
            changed["first"] = data.draw(st.integers(-5, 800))
        if data.draw(st.booleans()):
            changed["count"] = data.draw(st.integers(-5, 2**40))
        try:
            apply_rows(there, msgspec.structs.replace(piece, **changed))
        except ValueError:
            continue
        if there.rows:
            there.window([0], -(2**40), 2**40, 10)


def test_a_restarted_run_replaces_the_earlier_data():
    old, new, viewer = (MemorySeries(table(), 64) for _ in range(3))
    steps, values = series(5, 3000)
    fill(old, steps, values)
    while viewer.rows < old.rows:
        apply_rows(viewer, rows_since(old, viewer.rows, 3000))
    steps, values = series(6, 900)
    fill(new, steps, values)
    apply_rows(viewer, rows_since(new, viewer.rows, 100_000))
    while viewer.rows < new.rows:
        apply_rows(viewer, rows_since(new, viewer.rows, 100_000))
    check_window(viewer, steps, values, int(steps[0]), int(steps[-1]) + 1, 30)


def test_history_serves_all_tables_within_a_budget():
    here, there = MemoryHistory(), MemoryHistory()
    for history in (here, there):
        history.declare(table(3, 0))
        history.declare(table(40, 2, "grad_norm"))
    assert here.cursors() == (0, 0, 0)
    for step in range(1, 4000):
        here.tables[0].append(step, np.full(3, step, np.float32))
        here.tables[2].append(step, np.full(40, step, np.float32))
    rounds = 0
    more = True
    while more:
        rows, more = here.rows_since(there.cursors(), 30_000)
        spent = sum(len(r.values) + len(r.low) + len(r.high) + len(r.steps) for r in rows)
        assert spent < 40_000
        for piece in rows:
            there.apply(piece)
        rounds += 1
        assert rounds < 100
    assert there.cursors() == (3999, 0, 3999)
    assert there.version > here.version
    assert there.table("grad_norm") is there.tables[2]
    assert there.table("clip") is None
    with pytest.raises(ValueError, match="not declared"):
        there.apply(Rows(9, 0, 1, b"", b""))


def test_a_column_and_its_newest_value_by_name() -> None:
    held = MemorySeries(table())
    assert (held.column("c2"), held.column("loss")) == (2, None)
    assert held.newest("c2") is None
    held.append(1, np.float32([1, 2, 3]))
    held.append(4, np.float32([5, 6, 7]))
    assert held.newest("c2") == 7
    assert held.newest("loss") is None


def test_the_newest_value_that_was_measured() -> None:
    held = MemorySeries(table())
    assert held.newest_measured("c2") is None
    missing = absent(Absent.NOT_MEASURED)
    for step, value in ((1, 3.0), (2, np.nan), (5, missing), (6, missing)):
        held.append(step, np.float32([1, 2, value]))
    found = held.newest_measured("c2")
    assert found is not None
    assert np.isnan(found)  # a value that is not finite was measured, too
    held.append(9, np.float32([1, 2, 4]))
    held.append(10, np.float32([1, 2, missing]))
    assert held.newest_measured("c2") == 4
    assert held.newest_measured("loss") is None
