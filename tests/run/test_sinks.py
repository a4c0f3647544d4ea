from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.rows import clip_row, step_row
from tui_trainer.history.records import ClipRecord, StepRecord
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.protocol.events import ConfusionMatrix, ImageSample, Notice, TextSample
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import (
    CLIP_COLUMNS,
    STEP_COLUMNS,
    AttentionInfo,
    Column,
    ParameterInfo,
    RunInfo,
    Table,
)
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.sinks import Output
from tui_trainer.run.sinks.jsonlines import JsonLines, step_object
from tui_trainer.run.sinks.plain import PlainLines, facts, notice, summary

_spec = importlib.util.spec_from_file_location("schema", Path(__file__).parent / "schema.py")
schema = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(schema)

NAN, INF = float("nan"), float("inf")


def write_run(sink_class, path):
    """A short story with one of everything."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    recorder = Recorder(RunInfo(name="r", task="gpt", configuration={"a": None}))
    recorder.subscribe(sink_class(Output(descriptor)))
    columns = (Column("b.0.cos_qk"), Column("b.0.drift_q"), Column("b.1.cos_qk"))
    tables = [
        recorder.new_table("step", STEP_COLUMNS),
        recorder.new_table("clip", CLIP_COLUMNS),
        recorder.new_table("grad_norm", (Column("a.weight"), Column("b.weight"))),
        recorder.new_table("attention", columns),
        recorder.new_table("phase_ms", (Column("data"), Column("clip"))),
        recorder.new_table("validation", (Column("loss"), Column("accuracy"))),
        recorder.new_table("attention_spectrum", (Column("b.0.sigma_max_q"),)),
    ]
    recorder.row(5, 0, np.array([4.5, NAN], np.float32))
    recorder.describe(
        parameters=tuple(ParameterInfo(n, (2, 3), "float32", 6) for n in ("a.weight", "b.weight")),
        attention=(
            AttentionInfo("b.0", "separate", "q", "k", "v"),
            AttentionInfo(
                "b.1", "grouped", "q", "k", "v", note="small K", incomparable=("qk", "qv")
            ),
        ),
        optimizers=("adamw",),
    )
    rows = [
        step_row(0.1, 3e-4, 2.0, 12.5),
        clip_row(1.0, 2.0, 1.0, 0.5),
        [INF, 1e-30],
        [0.25, NAN, NAN],
        [1.5, NAN],
    ]
    made = [(i, np.array(row, np.float32)) for i, row in zip(tables, rows, strict=False)]
    clip = ClipRecord(1.0, 2.0, 0.5, (1, 0), (0.75, 0.25))
    recorder.record(StepRecord(1, 10.0, "", tuple(made), clip, (("gradient", "a.weight", "inf"),)))
    spectrum = (6, np.array([3.0], np.float32))
    recorder.record(StepRecord(2, 11.0, "", (made[0], spectrum)))
    recorder.notice("mark", "a\nnote", who="me")
    recorder.artifact(TextSample(0, 2, "To", " be\n"))
    recorder.artifact(ImageSample(0, 2, 1, 1, b"abc", ("7",), (0.5,), ("1",)))
    recorder.artifact(ConfusionMatrix(0, 2, ("a", "b"), ((1, 0), (0, 2))))
    recorder.log("stdout", "a line of the script")
    recorder.end("crashed", "it broke", "mend it")
    assert recorder.close(240)
    return path.read_text()


@pytest.fixture
def lines(tmp_path):
    return [json.loads(line, parse_constant=pytest.fail) for line in
            write_run(JsonLines, tmp_path / "out").splitlines()]  # fmt: skip


def test_every_line_fits_the_schema(lines):
    assert [fault for line in lines for fault in schema.faults(line)] == []


def test_the_schema_refuses_invalid_lines(lines):
    for line in lines:
        assert schema.faults({**line, "type": "other"})
        assert schema.faults({k: v for k, v in line.items() if k not in ("type",)})
    step = next(line for line in lines if line["type"] == "step")
    assert schema.faults({**step, "loss": "nan"})
    assert schema.faults({**step, "unheard": 1})


def test_the_header_comes_first_and_nothing_is_lost(lines):
    assert [line["type"] for line in lines] == [
        *("run", "validation", "step", "event", "step", "event", "sample", "sample", "sample"),
        "end",
    ]
    assert [p["name"] for p in lines[0]["parameters"]] == ["a.weight", "b.weight"]
    assert lines[-1]["steps"] == 2


def test_a_step_has_its_values_in_the_fewest_digits(lines):
    step = lines[2]
    assert (step["loss"], step["lr"], step["grad_norm_preclip"]) == (0.1, 3e-4, 2.0)
    assert step["clip"]["clipped"] is True
    assert step["clip"]["dominant"][0] == {"parameter": "b.weight", "share": 0.75}
    assert step["grad_norm"] == {"a.weight": None, "b.weight": 1e-30}
    assert step["phase_ms"] == {"data": 1.5}
    assert step["attention"] == [
        {"layer": "b.0", "cos_qk": 0.25, "drift_q": None},
        {"layer": "b.1", "cos_qk": None},
    ]
    # b.1's comparison has no meaning, which is no non-finite value
    assert step["nonfinite"] == {"grad_norm.a.weight": "inf", "attention.b.0.drift_q": "nan"}
    later = lines[4]
    assert later["clip"] is None
    assert later["attention"] == [{"layer": "b.0", "sigma_max_q": 3.0}]
    assert "nonfinite" not in later


def test_only_the_pairs_without_meaning_are_left_out_of_what_is_not_finite():
    names = ("cos_qk", "cos_qv", "grad_cos_kv", "norm_q", "growth")
    own = tuple(Column(f"decoder.0.{name}") for name in names)
    info = RunInfo(
        name="r",
        task="script",
        optimizers=("adam", "sgd"),
        attention=(
            AttentionInfo("encoder.0", "separate", "q", "k", "v", note="no", incomparable=("qk",)),
            AttentionInfo(
                "decoder.0", "separate", "q", "k", "v", note="V", incomparable=("qv", "kv")
            ),
        ),
        tables=(Table(0, "attention", ()), Table(1, "attention", own, optimizer="sgd")),
    )
    row = np.array([NAN, NAN, NAN, NAN, INF], np.float32)
    step = step_object(info, StepRecord(1, 10.0, "sgd", ((1, row),)))
    assert step["attention"] == [{"layer": "decoder.0", **dict.fromkeys(names)}]
    assert step["nonfinite"] == {
        "attention.decoder.0.cos_qk": "nan",
        "attention.decoder.0.norm_q": "nan",
        "attention.decoder.0.growth": "inf",
    }


def test_the_header_comes_again_when_something_turns_out_to_be_unseen(tmp_path):
    descriptor = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    recorder = Recorder(RunInfo(name="r", task="script"))
    recorder.subscribe(JsonLines(Output(descriptor)))
    table = recorder.new_table("step", STEP_COLUMNS)
    recorder.describe(optimizers=("adamw",))
    row = np.zeros(len(STEP_COLUMNS), np.float32)
    recorder.record(StepRecord(1, 10.0, "", ((table, row),)))
    for reason in ("it is computed by hand", "it is computed by hand"):
        recorder.describe(unseen={"attention_health": reason})
        recorder.record(StepRecord(2, 11.0, "", ((table, row),)))
    recorder.end("finished")
    assert recorder.close(240)
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["run", "step", "run", "step", "step", "end"]
    assert lines[2]["unseen"] == {"attention_health": "it is computed by hand"}


def test_plain_lines(tmp_path):
    text = write_run(PlainLines, tmp_path / "out")
    assert text.splitlines()[0].endswith("gpt · run r")
    assert "2 parameter tensors, 12 numbers" in text
    assert "step 1: gradient became inf in a.weight" in text
    assert "step       2  loss 0.1000  lr 3.000e-4  grad 2.0000  clipped 100 %" in text
    assert text.endswith(": it broke\nhint: tui-trainer show r shows what was measured\n")


def test_a_norm_that_a_step_has_not_measured_is_the_last_one(tmp_path):
    descriptor = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    recorder = Recorder(RunInfo(name="r", task="script"))
    recorder.subscribe(PlainLines(Output(descriptor), lambda: 0.0))
    table = recorder.new_table("step", STEP_COLUMNS)
    for number, norm in ((1, 2.5), (2, absent(Absent.NOT_MEASURED))):
        recorder.record(StepRecord(number, 10.0, "", ((table, step_row(0.1, 0.1, norm, 1.0)),)))
        assert recorder.flush(240)
    recorder.end("finished")
    assert recorder.close(240)
    assert "step       2  loss 0.1000  lr 0.1000  grad 2.5000" in (tmp_path / "out").read_text()


def test_the_last_plain_line():
    could_not = Status(state="crashed", step=0, reason="no data", hint="find some")
    assert summary(could_not, "r") == "could not start: no data"  # stderr has the hint
    idle = Status(state="finished", step=0)
    assert summary(idle, "r") == "finished, without a step of a torch optimizer"
    nan = Status(state="finished", step=1, elapsed_s=78, hint="the loss was nan")
    assert summary(nan, "r") == "finished after 1 step in 1:18\nhint: the loss was nan"


def test_a_notice_of_many_lines_is_one_plain_line():
    fault = Notice(0, 3, 10.0, "fault", "evaluation:\n\n  it " + "broke " * 100, "error")
    assert notice(fault).startswith("step 3: error: evaluation: it broke broke")
    assert len(notice(fault)) < 330
    assert notice(Notice(0, 3, 10.0, "checkpoint", "saved")) == "step 3: saved"


def test_facts_are_printed_once():
    info = RunInfo(name="r", task="vit", facts={"images": 494_149, "device": "cpu", "data": "x"})
    assert facts(info) == "images 494,149 · data x"
