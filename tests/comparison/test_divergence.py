"""The first step and quantity at which two recorded runs differ, against a slow reference."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tui_trainer.comparison import divergence
from tui_trainer.comparison.divergence import first_difference
from tui_trainer.history.records import StepRecord
from tui_trainer.protocol import PHASES, schema
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import Column, RunInfo, Table
from tui_trainer.record.sink_items import InfoChanged, StepRecorded
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.series import StoredLevel
from tui_trainer.store.writer import StoreWriter

NAMES = ("embed.weight", "block.weight", "head.weight")
COLUMNS = {
    schema.STEP: schema.STEP_COLUMNS,
    schema.GRAD_NORM: tuple(map(Column, NAMES)),
    schema.UPDATE_RATIO: tuple(map(Column, NAMES)),
    schema.CLIP: schema.CLIP_COLUMNS,
    schema.PHASE_MS: schema.PHASE_COLUMNS,
    schema.LOGGED: (Column("score"),),
    schema.OVERHEAD: (Column("tracer"),),
}


def stored(directory: Path, tables: dict[str, dict[int, np.ndarray]], commits: int = 3):
    """A recorded run with these rows: table → step → values."""
    directory.mkdir(parents=True, exist_ok=True)
    described = tuple(Table(number, name, COLUMNS[name]) for number, name in enumerate(tables))
    sink = StoreWriter(directory)
    sink.take([InfoChanged(RunInfo(directory.name, "gpt", tables=described))], Status())
    steps = sorted({step for rows in tables.values() for step in rows})
    for part in np.array_split(np.array(steps), commits):
        items = [
            StepRecorded(StepRecord(step, float(step), "", tuple(
                (number, np.asarray(rows[step], np.float32))
                for number, rows in enumerate(tables.values())
                if step in rows
            )))
            for step in part.tolist()
        ]  # fmt: skip
        sink.take(items, Status(state="running", step=int(part[-1]) if len(part) else 0))
        sink.commit()
    sink.close()
    return StoredHistory(directory)


def training(steps: int, gradients_every: int = 1, first: int = 1, seed: int = 0):
    """What two runs with the same seed would measure; times are never the same twice."""
    made = np.random.default_rng(seed).random((steps + 1, 12)).astype(np.float32) + 0.5
    widths = steps + 1, len(schema.PHASE_COLUMNS)
    times = np.random.default_rng().random(widths).astype(np.float32)
    numbers = range(first, steps + 1)
    return {
        schema.STEP: {i: np.array([made[i, 0], 1e-3, made[i, 1], times[i, 0], 1]) for i in numbers},
        schema.GRAD_NORM: {i: made[i, 2:5] for i in numbers if i % gradients_every == 0},
        schema.UPDATE_RATIO: {i: made[i, 5:8] for i in numbers if i % (4 * gradients_every) == 0},
        schema.CLIP: {i: np.array([1, made[i, 1], 1, 0.5, 1]) for i in numbers},
        schema.PHASE_MS: {i: times[i] for i in numbers},
        schema.LOGGED: {i: made[i, 8:9] for i in numbers if i % 10 == 0},
        schema.OVERHEAD: {i: times[i, :1] for i in numbers},
    }


def change(rows, step, column, value):
    row = np.array(rows[step], np.float32)
    row[column] = value
    rows[step] = row


def compare(tmp_path, a, b, tolerance=0.0):
    one, other = stored(tmp_path / "a", a), stored(tmp_path / "b", b)
    try:
        return first_difference(one, other, tolerance)
    finally:
        one.close()
        other.close()


def test_the_same_training_twice_has_no_difference(tmp_path):
    found = compare(tmp_path, training(50), training(50))
    assert found.first is None
    assert found.steps == 50
    assert found.only_in == ((), ())
    assert found.group == 1


@pytest.mark.parametrize(
    ("table", "column", "phase", "words"),
    [
        (schema.STEP, 0, "loss", "loss"),
        (schema.STEP, 1, "step", "learning rate"),
        (schema.STEP, 2, "backward", "gradient norm of all parameters"),
        (schema.GRAD_NORM, 1, "backward", "gradient norm of block.weight"),
        (schema.UPDATE_RATIO, 0, "step", "update ratio of embed.weight"),
        (schema.CLIP, 0, "clip", "limit of the clipping (max_norm)"),
        (schema.LOGGED, 0, "log", "logged score"),
    ],
)
def test_a_planted_difference_is_named_with_both_sides(tmp_path, table, column, phase, words):
    a, b = training(60), training(60)
    change(b[table], 40, column, 7.5)
    change(b[table], 60, column, 9.5)
    first = compare(tmp_path, a, b).first
    assert first is not None
    assert (first.step, first.phase, first.quantity) == (40, phase, words)
    assert first.values == (float(np.float32(a[table][40][column])), 7.5)
    before = max(step for step in a[table] if step < 40)
    assert first.equal_until == before
    assert first.others == 0
    around = {step: (x, y) for step, x, y in first.around}
    assert around[40] == first.values
    assert around[before][0] == around[before][1]
    assert max(around) > 40
    assert first.text_of(7.5) == "7.5"


@pytest.mark.parametrize("swapped", [False, True])
def test_gradients_scaled_in_one_run_only_are_named_before_their_update(tmp_path, swapped):
    a, b = training(30), training(30)
    del a[schema.CLIP]
    b[schema.CLIP] = {20: np.array([absent(Absent.NO_LIMIT), 2.0, 1.5, 0.75, 1])}
    change(b[schema.UPDATE_RATIO], 20, 1, 7.5)
    runs = (b, a) if swapped else (a, b)
    first = compare(tmp_path, *runs).first
    assert first is not None
    assert (first.step, first.phase) == (20, "clip")
    assert first.quantity == "gradient norm after clipping"
    texts = [first.text_of(value) for value in first.values]
    assert sorted(texts) == ["1.5", "the step had no such phase"]
    assert sorted(first.short_texts(*first.values)) == ["1.5", "none"]
    assert first.others == 1
    # A clipping that changed nothing later is not looked for.
    a, b = training(30), training(30)
    del a[schema.CLIP]
    assert compare(tmp_path / "equal", a, b).first is None


def test_of_several_quantities_the_earliest_of_the_step_is_named(tmp_path):
    a, b = training(30), training(30)
    for step in range(20, 31):
        for table, width in ((schema.GRAD_NORM, 3), (schema.CLIP, 5), (schema.UPDATE_RATIO, 3)):
            for column in range(width):
                if step in b[table]:
                    change(b[table], step, column, 3 + column)
    first = compare(tmp_path, a, b).first
    assert first is not None
    # Backward computes the gradient of the last layer first.
    assert (first.step, first.quantity) == (20, "gradient norm of head.weight")
    assert first.others == 2 + 5 + 3


def test_quantities_of_other_cadences_are_compared_at_common_steps(tmp_path):
    a, b = training(120, gradients_every=4), training(120, gradients_every=6)
    for step in b[schema.GRAD_NORM]:
        if step >= 50:
            change(b[schema.GRAD_NORM], step, 0, 5)
    first = compare(tmp_path, a, b).first
    assert first is not None
    assert (first.step, first.equal_until) == (60, 48)
    assert [step for step, *_ in first.around] == [36, 48, 60, 72, 84]


def test_a_run_that_begins_later_is_compared_from_there(tmp_path):
    a, b = training(90), training(90, first=41)
    change(b[schema.STEP], 77, 0, 9)
    found = compare(tmp_path, a, b)
    assert found.first is not None
    assert (found.first.step, found.first.quantity) == (77, "loss")
    assert found.steps == 50


def test_a_phase_that_only_one_run_has(tmp_path):
    a, b = training(20), training(20)
    clip = PHASES.index("clip")
    for step in range(9, 21):
        change(b[schema.PHASE_MS], step, clip, absent(Absent.NO_PHASE))
        del b[schema.CLIP][step]
    first = compare(tmp_path, a, b).first
    assert first is not None
    assert (first.step, first.phase, first.quantity) == (9, "clip", "phase clip")
    assert first.text_of(first.values[1]) == "no such phase"


def test_tables_of_one_run_only_are_named(tmp_path):
    a, b = training(12), training(12)
    del b[schema.CLIP], a[schema.LOGGED]
    found = compare(tmp_path, a, b)
    assert found.first is None
    assert found.only_in == ((schema.CLIP,), (schema.LOGGED,))


def test_nan_and_absent_values(tmp_path):
    a, b = training(12), training(12)
    for made in (a, b):
        change(made[schema.STEP], 3, 0, np.nan)
    change(b[schema.GRAD_NORM], 5, 0, absent(Absent.NOT_MEASURED))
    change(b[schema.GRAD_NORM], 8, 1, absent(Absent.NOT_REACHED))
    first = compare(tmp_path, a, b).first
    assert first is not None
    assert (first.step, first.column) == (8, "block.weight")
    assert first.text_of(first.values[1]) == "not reached by backward"


def test_a_tolerance_allows_rounding(tmp_path):
    a, b = training(40), training(40)
    for step in range(1, 41):
        for table in (schema.STEP, schema.GRAD_NORM):
            b[table][step] = np.float32(a[table][step] * (1 + 1e-6))
    b[schema.STEP] = {i: np.array([r[0], 1e-3, *r[2:]]) for i, r in b[schema.STEP].items()}
    # A gradient that should be zero is rounding noise, whatever its ratio.
    for made, noise in ((a, 1e-9), (b, 3e-9)):
        change(made[schema.GRAD_NORM], 7, 2, noise)
    assert compare(tmp_path / "at all", a, b).first.step == 1
    assert compare(tmp_path / "rounding", a, b, 1e-4).first is None
    change(b[schema.STEP], 30, 1, 1.1e-3)
    first = compare(tmp_path / "more", a, b, 1e-4).first
    assert (first.step, first.quantity) == (30, "learning rate")


def slow_reference(a, b):
    """The first step with a value that differs."""
    for step in range(1, 1 + max(map(max, a.values()))):
        for table in (schema.STEP, schema.GRAD_NORM, schema.UPDATE_RATIO, schema.CLIP):
            x, y = a[table].get(step), b[table].get(step)
            if x is None or y is None:
                continue
            columns = [0, 1, 2] if table == schema.STEP else range(len(x))
            if any(np.float32(x[i]) != np.float32(y[i]) for i in columns):
                return step
    return None


@pytest.mark.parametrize("seed", range(10))
def test_long_tables_are_searched_by_their_buckets(tmp_path, monkeypatch, seed):
    """With so little to read that every table is searched from a coarse level."""
    chance = random.Random(seed)
    steps = chance.randint(600, 3000)
    a = training(steps, gradients_every=chance.choice([1, 3]))
    b = training(steps, gradients_every=chance.choice([1, 2]))
    table = chance.choice([schema.STEP, schema.GRAD_NORM, schema.CLIP])
    for step in range(chance.randint(1, steps), steps + 1):  # runs that have parted stay apart
        if step in b[table]:
            change(b[table], step, 0, a[table].get(step, np.zeros(1))[0] + 0.25)
    monkeypatch.setattr(divergence, "MAX_VALUES", 500)
    first = compare(tmp_path, a, b).first
    assert (first.step if first else None) == slow_reference(a, b)


def test_only_a_part_of_a_long_run_is_read(tmp_path, monkeypatch):
    steps = 20_000
    a = {schema.STEP: training(steps)[schema.STEP]}
    b = {schema.STEP: {step: np.array(row) for step, row in a[schema.STEP].items()}}
    for step in range(18_107, steps + 1):
        change(b[schema.STEP], step, 0, 2)
    monkeypatch.setattr(divergence, "MAX_VALUES", 6_700)
    read = 0
    original = StoredLevel.buckets

    def counting(self, start, stop, columns=None):
        nonlocal read
        read += max(0, stop - start)
        return original(self, start, stop, columns)

    monkeypatch.setattr(StoredLevel, "buckets", counting)
    found = compare(tmp_path, a, b)
    assert found.first is not None
    assert (found.first.step, found.first.quantity, found.group) == (18_107, "loss", 64)
    assert read < 2 * steps / 10
