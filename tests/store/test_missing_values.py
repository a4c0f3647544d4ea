"""Commands that read a recording assume neither a table nor a row, a column or a value."""

from __future__ import annotations

import contextlib
import io
import json
import time
import warnings

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tui_trainer.cli.commands.compare import compare
from tui_trainer.cli.commands.export import export
from tui_trainer.cli.commands.report import report
from tui_trainer.cli.commands.show import show
from tui_trainer.client.replay import ReplaySession
from tui_trainer.config.run_spec import RunSpec, RunState, write_spec, write_state
from tui_trainer.history.records import ClipRecord, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.events import Clip
from tui_trainer.protocol.schema import AttentionInfo, Column, ParameterInfo, RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.store.writer import StoreWriter

LAYERS = ("blocks.0.attention", "blocks.1.attention")
NAMES = tuple(f"{layer}.W_{x}.weight" for layer in LAYERS for x in ("query", "key", "value"))
TABLES = {
    schema.STEP: schema.STEP_COLUMNS,
    schema.CLIP: schema.CLIP_COLUMNS,
    schema.PHASE_MS: schema.PHASE_COLUMNS,
    schema.GRAD_NORM: tuple(map(Column, NAMES)),
    schema.WEIGHT_NORM: tuple(map(Column, NAMES)),
    schema.UPDATE_RATIO: tuple(map(Column, NAMES)),
    schema.VALIDATION: (Column("loss", "", "lower"), Column("accuracy", "", "higher")),
    schema.MEMORY: schema.MEMORY_COLUMNS,
    schema.ATTENTION: schema.attention_columns(LAYERS, schema.ATTENTION_STATISTICS),
    schema.ATTENTION_SPECTRUM: schema.attention_columns(LAYERS, schema.SPECTRUM_STATISTICS),
    schema.ATTENTION_HEALTH: schema.attention_columns(LAYERS, schema.HEALTH_STATISTICS),
    schema.ATTENTION_HEADS: schema.head_columns(tuple((layer, 2) for layer in LAYERS)),
}
ODD = (np.nan, np.inf, -np.inf, 0.0, 3e38, absent(Absent.FROZEN), absent(Absent.LOSS_NOT_SEEN))


@st.composite
def tables(draw):
    """(name, columns, optimizer, rows (rows, columns)) of some tables."""
    chosen = []
    for name in draw(st.lists(st.sampled_from(sorted(TABLES)), max_size=8)):
        columns = TABLES[name][:: draw(st.sampled_from((1, 1, 2)))]
        columns = columns[draw(st.sampled_from((0, 0, 1, len(columns)))) :]
        shape = (draw(st.sampled_from((0, 1, 3, 20))), len(columns))
        values = np.linspace(0.1, 1, shape[0] * shape[1], dtype=np.float32).reshape(shape)
        if values.size:
            at = draw(st.lists(st.integers(0, values.size - 1), max_size=4))
            values.flat[at] = draw(st.sampled_from(ODD))
            if draw(st.integers(0, 4)) == 0:
                values[:] = draw(st.sampled_from(ODD))
        chosen.append((name, columns, draw(st.sampled_from(("", "adam", "sgd"))), values))
    return chosen


INFO = RunInfo("calm", "gpt", "gpt · small", revision=1)
DESCRIPTIONS = {
    "parameters": tuple(ParameterInfo(name, (8, 8), "float32", 64) for name in NAMES),
    "attention": tuple(
        AttentionInfo(layer, "separate", *NAMES[3 * n : 3 * n + 3], 2, 2, 4)
        for n, layer in enumerate(LAYERS)
    ),
    "optimizers": ("adam", "sgd"),
    "configuration": {"learning_rate": 1e-3, "text": ""},
    "total_steps": 20,
    "steps_per_epoch": 1,
    "unseen": {"clip": "this script never clips", "loss": "not seen"},
}


def record(place, recorded, description, state):
    place.mkdir(mode=0o700, parents=True)
    write_spec(RunSpec(name=place.name, directory=str(place), task="gpt", title=INFO.title))
    recorder = Recorder(msgspec.structs.replace(INFO, name=place.name))
    recorder.subscribe(StoreWriter(place))
    recorder.describe(**description)
    numbers = [recorder.new_table(name, columns, 1, key) for name, columns, key, _ in recorded]
    for step in range(1, 1 + max((len(values) for *_, values in recorded), default=0)):
        rows = tuple(
            (number, values[step - 1])
            for number, (*_, values) in zip(numbers, recorded, strict=True)
            if step <= len(values)
        )
        clip = ClipRecord(1.0, float("nan"), 0.5, (0, 99), (0.5, 0.5)) if step == 2 else None
        recorder.record(StepRecord(step, 1.7e9 + step, "", rows, clip, ()))
    if state:
        recorder.end(state, "")
    assert recorder.close(240)
    if state:
        run_state = RunState(
            name=place.name, task="gpt", state=state, started_at=1.7e9, written_at=time.time()
        )
        write_state(place, run_state)


def look_back(place):
    replay = ReplaySession(place)
    for step in (0, 1, 2, 10**9):
        replay.seek(step)
        replay.poll()
        for kind in ("clip", "mark", "nonfinite"):
            replay.moments.places(kind, replay.last_step, 80)
            replay.moments.next_event(kind, step)
    replay.spikes()
    replay.close()


def run_commands(runs, out):
    """Every command that reads a recording."""
    printed = {}
    calls = {
        "show": lambda: show("calm", once=True, runs_dir=runs),
        "show --json": lambda: show("calm", json=True, runs_dir=runs),
        "report": lambda: report("calm", output=out / "calm.html", runs_dir=runs),
        "compare": lambda: compare("calm", "eager", plain=True, runs_dir=runs),
        "compare --json": lambda: compare("calm", "eager", json=True, runs_dir=runs),
        "csv": lambda: exported(runs, "csv", out),
        "jsonl": lambda: exported(runs, "jsonl", out),
        "parquet": lambda: exported(runs, "parquet", out),
        "tensorboard": lambda: exported(runs, "tensorboard", out),
    }
    for name, call in calls.items():
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            assert call() == 0, name
        printed[name] = stdout.getvalue()
    return printed


def exported(runs, format, out):
    return export("calm", format=format, output=out / format, overwrite=True, runs_dir=runs)


def no_constant(name):
    raise ValueError(f"{name} is no JSON")


@given(
    recorded=tables(),
    other=tables(),
    described=st.sets(st.sampled_from(sorted(DESCRIPTIONS))),
    state=st.sampled_from(("finished", "crashed", "")),
)
@settings(
    max_examples=examples(12),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@pytest.mark.slow
def test_commands_run_whatever_is_missing(tmp_path_factory, recorded, other, described, state):
    place = tmp_path_factory.mktemp("missing")
    runs = place / "runs"
    runs.mkdir(mode=0o700)
    description = {name: DESCRIPTIONS[name] for name in described}
    record(runs / "calm", recorded, description, state)
    record(runs / "eager", other, DESCRIPTIONS, "finished")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # such as the mean of an empty slice
        printed = run_commands(runs, place)
        look_back(runs / "calm")
    for name in ("show --json", "compare --json"):
        json.loads(printed[name], parse_constant=no_constant)
    for line in (place / "jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constant)
    assert "calm" in printed["show"]


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_table_without_columns_or_rows_is_exported(tmp_path, name):
    (tmp_path / "runs").mkdir(mode=0o700)
    empty = [(name, (), "", np.empty((9, 0), np.float32))]
    empty.append((name, TABLES[name], "", np.empty((0, len(TABLES[name])), np.float32)))
    record(tmp_path / "runs" / "calm", empty, {}, "finished")
    record(tmp_path / "runs" / "eager", [], {}, "finished")
    run_commands(tmp_path / "runs", tmp_path)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_clip_of_a_norm_that_is_not_finite_is_read(tmp_path, norm):
    recorder = Recorder(INFO)
    recorder.subscribe(StoreWriter(tmp_path))
    table = recorder.new_table(schema.STEP, schema.STEP_COLUMNS)
    clip = ClipRecord(1.0, norm, 0.0, (0,), (1.0,))
    rows = ((table, np.ones(len(schema.STEP_COLUMNS), np.float32)),)
    recorder.record(StepRecord(1, 1.7e9, "", rows, clip, ()))
    assert recorder.close(240)
    replay = ReplaySession(tmp_path)
    replay.seek(1)
    seen = replay.poll()
    replay.close()
    assert seen.link.message == ""
    (event,) = (each for each in seen.events if isinstance(each, Clip))
    assert str(event.norm_before) == str(norm)
