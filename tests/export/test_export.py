"""Exported runs, read back by the readers of the formats' own tools."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import shutil
import tracemalloc

import numpy as np
import pytest

from tests.cli.calling import assert_refused, call
from tests.recorded_runs import STEPS, directory, fingerprint, home
from tests.store.test_recorded_items import train
from tui_trainer.export.formats import joined, measured, per_step, write_csv, write_jsonl
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.runs.recording import open_history
from tui_trainer.store import STORE_FILE
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.writer import StoreWriter


def lines_of(name="calm"):
    return [json.loads(line) for line in (home() / f"{name}.jsonl").read_text().splitlines()]


def steps_of(name="calm"):
    return {line["step"]: line for line in lines_of(name) if line["type"] == "step"}


def export(*arguments, **options):
    return call("export", *arguments, cwd=home(), **options)


def test_jsonl_is_what_json_printed(tmp_path):
    before = fingerprint(directory("calm"))
    done = export("calm", "--format", "jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (home() / "calm.jsonl").read_text()
    path = tmp_path / "new" / "calm.jsonl"
    done = export("calm", "--format", "jsonl", "--output", path)
    assert path.read_bytes() == (home() / "calm.jsonl").read_bytes()
    assert fingerprint(directory("calm")) == before


def test_a_closed_pipe_ends_an_export_in_silence(capfd):
    read_end, write_end = os.pipe()
    os.close(read_end)
    history = open_history(directory("calm"))
    try:
        with pytest.raises(BrokenPipeError):
            write_jsonl(history, write_end)
    finally:
        history.close()
    assert capfd.readouterr().err == ""


def test_csv(tmp_path):
    done = export("calm", "--format", "csv", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["step", "time", "loss", "learning_rate"]
    printed = steps_of()
    assert (
        [int(row["step"]) for row in rows if row["loss"]] == list(printed) == [*range(1, STEPS + 1)]
    )
    for row in rows:
        line = printed.get(int(row["step"]))
        if line is None:
            assert row["validation.loss"]  # before the first step
            continue
        assert float(row["time"]) == line["time"]
        assert np.float32(row["loss"]) == np.float32(line["loss"])
        assert np.float32(row["clip.scale"]) == np.float32(line["clip"]["scale"])
        assert np.float32(row["phase_ms.backward"]) == np.float32(line["phase_ms"]["backward"])
    with open(tmp_path / "out" / "grad_norm.csv", newline="") as file:
        norms = {int(row.pop("step")): row for row in csv.DictReader(file)}
    assert norms
    for step, row in norms.items():
        assert {k: np.float32(v) for k, v in row.items()} == {
            k: np.float32(v) for k, v in printed[step]["grad_norm"].items()
        }
    with open(tmp_path / "out" / "events.csv", newline="") as file:
        events = list(csv.DictReader(file))
    clipped = [step for step, line in printed.items() if line["clip"]["clipped"]]
    assert [int(event["step"]) for event in events if event["kind"] == "clip"] == clipped


def test_parquet(tmp_path):
    parquet = importlib.import_module("pyarrow.parquet")  # the extra `test` brings it
    done = export("calm", "--format", "parquet", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = parquet.read_table(tmp_path / "out" / "steps.parquet")
    printed = steps_of()
    losses = table.select(["step", "loss"]).to_pylist()
    known = {row["step"]: row["loss"] for row in losses if row["loss"] is not None}
    assert known == {step: float(np.float32(line["loss"])) for step, line in printed.items()}
    assert table["validation.loss"].null_count > 0
    assert json.loads(table.schema.metadata[b"tui_trainer.run"])["name"] == "calm"
    wide = parquet.read_table(tmp_path / "out" / "grad_norm.parquet").to_pydict()
    for at, step in enumerate(wide.pop("step")):
        line = printed[step]["grad_norm"]
        assert {name: values[at] for name, values in wide.items()} == {
            name: float(np.float32(value)) for name, value in line.items()
        }


def test_tensorboard_reads_its_directory(tmp_path):
    # As above: that the reader is missing must not pass for a test.
    accumulators = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    done = export("calm", "--format", "tensorboard", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    reader = accumulators.EventAccumulator(str(tmp_path / "out"), {accumulators.SCALARS: 0})
    reader.Reload()
    printed = steps_of()
    loss = reader.Scalars("train/loss")
    assert [point.step for point in loss] == list(printed)
    assert [np.float32(point.value) for point in loss] == [
        np.float32(line["loss"]) for line in printed.values()
    ]
    assert [point.wall_time for point in loss] == [line["time"] for line in printed.values()]
    name = next(iter(printed[STEPS]["grad_norm"]))
    assert np.float32(reader.Scalars(f"grad_norm/{name}")[-1].value) == np.float32(
        printed[STEPS]["grad_norm"][name]
    )
    layer = printed[STEPS]["attention"][0]
    cosine = reader.Scalars(f"attention/{layer['layer']}.cos_qk")
    assert np.float32(cosine[-1].value) == np.float32(layer["cos_qk"])
    validation = [line for line in lines_of() if line["type"] == "validation"]
    assert {p.step: np.float32(p.value) for p in reader.Scalars("validation/loss")} == {
        line["step"]: np.float32(line["loss"]) for line in validation
    }


@pytest.mark.parametrize("package", ["pyarrow", "tensorboard"])
def test_a_missing_package_is_reported_with_its_install_command(tmp_path, package):
    """An empty finder in front hides the package, as if it were not installed."""
    hidden = (
        "import sys, importlib.util as u; found = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name == {package!r} else found(name, *a)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(hidden)
    format = {"pyarrow": "parquet"}.get(package, package)
    env = {"PYTHONPATH": str(tmp_path)}
    done = export("calm", "--format", format, env=env, cold=True)
    assert_refused(done, f'pip install "tui-trainer[{format}]"', status=1)


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "out"
    path.write_text("mine")
    assert_refused(export("calm", "--format", "csv", "--output", path), "already exists")
    assert path.read_text() == "mine"
    done = export("calm", "--format", "csv", "--output", path, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert (path / "steps.csv").is_file()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("calm",), "needs a --format"),
        (("calm", "--format", "xls"), "xls"),
        (("missing", "--format", "csv"), "there is no run missing"),
        (("calm", "--format", "csv", "--output", "/proc/nowhere/x"), "cannot export calm"),
    ],
)
def test_refused_exports(arguments, message):
    assert_refused(export(*arguments), message)


@pytest.mark.parametrize("command", [("export", "--format", "csv"), ("report",)])
def test_a_store_that_was_only_just_made(tmp_path, command):
    """Of a run that starts, or was killed, between the file and its tables."""
    place = tmp_path / "calm"
    shutil.copytree(directory("calm"), place, ignore=shutil.ignore_patterns(f"{STORE_FILE}*"))
    (place / STORE_FILE).touch()
    assert_refused(call(*command, place, cwd=tmp_path), "nothing was recorded", "tui-trainer show")


def recorded(place, steps):
    """Two optimizers, cadences, infinities."""
    recorder = Recorder(RunInfo("quiet-otter", "gpt"))
    recorder.subscribe(StoreWriter(place))
    train(recorder, steps)
    recorder.end("finished")
    assert recorder.close(240)
    return place


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("long"), 6000)


def test_joining_loses_nothing(long):
    history = StoredHistory(long, ended=True)
    chosen = per_step(history)
    seen = {place: [] for place in range(len(chosen))}
    last = -1
    for step, rows in joined(chosen):
        assert step > last
        last = step
        assert not math.isnan(history.step_times.time_of(step))
        for place, row in rows.items():
            seen[place].append((step, row))
    for place, table in enumerate(chosen):
        steps, values = table.tail(20_000)
        assert [step for step, _ in seen[place]] == steps.tolist()
        np.testing.assert_equal(np.stack([row for _, row in seen[place]]), values)
    assert {t.table.optimizer for t in measured(history)} == {"", "second"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(tmp_path, long):
    peaks = []
    for place in (recorded(tmp_path, 2000), long):
        out = tmp_path / str(len(peaks))
        out.mkdir()
        history = StoredHistory(place, ended=True)
        tracemalloc.start()
        write_csv(history, out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        history.close()
    # It levels off at 1.4 MB, once every table fills the pieces in which it is read.
    assert peaks[1] < 2 * peaks[0]
