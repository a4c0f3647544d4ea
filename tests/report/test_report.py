"""The report of a run: complete, self-contained, and safe for any name of the run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.cli.calling import assert_refused, call
from tests.recorded_runs import STEPS, directory, fingerprint, home
from tests.rows import step_row
from tests.ui.test_replay import BAD, CLIPS, SPIKE, WORSE, loss_at, record_run
from tui_trainer.history.healthy_ranges import HealthyRange
from tui_trainer.history.records import StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import AttentionInfo, ParameterInfo, RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.report import page as report_page
from tui_trainer.report.charts import LEFT, RIGHT, TOP, WIDTH, ticks
from tui_trainer.report.page import render
from tui_trainer.report.read import ReportData
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.writer import StoreWriter

VOID = {"meta", "br", "hr"}


class Reader(HTMLParser):
    """Checks that every element is closed where it should be, and keeps what is in them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(place):
    history = StoredHistory(place, ended=True)
    info, status = history.store.info(), history.store.status()
    return "".join(render(ReportData(history, info, status or Status())))


def assert_fetches_nothing(page):
    for tag, attributes in Reader(page).elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "use")
        for name in attributes:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "href", "xlink:href", "srcset", "data", "style"), (tag, name)
    assert not re.search(r"url\(|@import|https?://", page)


def test_a_real_run(tmp_path):
    before = fingerprint(directory("calm"))
    path = tmp_path / "page.html"
    done = call("report", "calm", "--output", path, cwd=home())
    assert done.returncode == 0, done.stderr
    assert fingerprint(directory("calm")) == before
    page = path.read_text(encoding="utf-8")
    assert_fetches_nothing(page)
    text = Reader(page).text
    for label in ("calm", "finished", f"{STEPS} of {STEPS}", "Gradient norm", "Learning rate"):
        assert label in text
    for label in (
        "Time of each phase",
        "cosines",
        "drift from initialisation",
        "largest gradients",
    ):
        assert label in text
    lines = [json.loads(line) for line in (home() / "calm.jsonl").read_text().splitlines()]
    for name, value in lines[0]["configuration"].items():
        if value is not None:
            assert name in text
    assert lines[0]["versions"]["torch"] in text
    assert "prefers-color-scheme: dark" in page
    to_pipe = call("report", "calm", "--output", "-", cwd=home())
    assert to_pipe.stdout.startswith("<!doctype html>")


def test_an_update_that_is_not_healthy_is_coloured(monkeypatch):
    calm = page_of(directory("calm"))
    assert "last (healthy 1e-4 to 0.1)" in Reader(calm).text
    assert 'class="n warning"' not in calm
    monkeypatch.setattr(report_page, "UPDATE_RATIO", HealthyRange(high=1e-12))
    assert 'class="n warning"' in page_of(directory("calm"))


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    place = tmp_path_factory.mktemp("eventful")
    record_run(place)
    return place


def chart_of(page, title):
    for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        picture = ElementTree.fromstring(found)
        if picture.findtext("title").startswith(title):
            return picture
    raise AssertionError(title)


def test_spikes_clips_and_gaps_are_drawn(eventful):
    page = page_of(eventful)
    loss = chart_of(page, "Loss")
    bands = [e.get("points") for e in loss.iter("polygon")]
    corners = [[float(v) for v in p.split(",")] for band in bands for p in band.split()]
    at = LEFT + (WORSE - 1) / 999 * (WIDTH - LEFT - RIGHT)
    highest = min(corners, key=lambda point: point[1] if abs(point[0] - at) < 3 else 1e9)
    first = min(corners, key=lambda point: point[0])
    # By the axis: the loss of step 1 is near the top, the spike in its proportion below.
    base = 260 - 26
    share = (loss_at(WORSE) - loss_at(600)) / (loss_at(1) - loss_at(600))
    near = [y for x, y in corners if abs(x - (LEFT + 599 / 999 * (WIDTH - LEFT - RIGHT))) < 2]
    drawn = (max(near) - highest[1]) / (max(near) - first[1])
    assert drawn == pytest.approx(share, abs=0.03)
    assert TOP <= highest[1] < base
    assert len([e for e in loss.iter("path") if e.get("class") == "bad"]) == 1
    norm = chart_of(page, "Gradient norm")
    marks = next(e for e in norm.iter("path") if e.get("class") == "mark").get("d")
    assert marks.count("M") == len(CLIPS)
    assert any(e.get("class") == "rule" for e in norm.iter("path"))
    text = Reader(page).text
    assert "limit 1, 3 clips" in text
    assert f"at step {WORSE}" in text
    assert "loss became nan" in text
    assert f"{BAD}" in text
    assert "look here (me)" in text
    assert SPIKE < WORSE


EVIL = "</title><script>alert('x')</script>\"&<img src=x onerror=1>\x00\ud800"


def test_every_text_of_a_run_is_escaped(tmp_path):
    evil = EVIL.replace("\ud800", "").replace("\x00", "")
    layer = AttentionInfo(evil, "separate", evil, evil, evil)
    recorder = Recorder(
        RunInfo(
            evil,
            "gpt",
            evil,
            command=(evil,),
            host=evil,
            started_at=1.0,
            versions={evil: evil},
            configuration={evil: evil},
            facts={evil: evil},
            unseen={evil: evil},
            parent=f"/x/{evil}",
            branch_step=3,
        )
    )
    recorder.subscribe(StoreWriter(tmp_path))
    recorder.describe(
        parameters=(ParameterInfo(evil, (1,), evil, 1),), attention=(layer,), working_directory=evil
    )
    step = recorder.new_table(schema.STEP, schema.STEP_COLUMNS)
    columns = schema.attention_columns((evil,), schema.ATTENTION_STATISTICS)
    attention = recorder.new_table(schema.ATTENTION, columns)
    norms = recorder.new_table(schema.GRAD_NORM, [columns[0].__class__(evil)])
    for n in range(4, 30):
        rows = (
            (step, step_row(n, n, n, n)),
            (attention, np.full(len(columns), n, np.float32)),
            (norms, np.float32([n])),
        )
        recorder.record(StepRecord(n, 1.0 * n, "", rows, None, (("loss", evil, "nan"),)))
    recorder.notice(evil, evil, evil, 5, evil)
    recorder.end("crashed", evil, evil)
    assert recorder.close(240)
    page = page_of(tmp_path)
    assert "<script" not in page
    assert "<img" not in page
    assert_fetches_nothing(page)
    assert Reader(page).text.count("alert('x')") > 10


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_with_nothing_in_it(tmp_path, steps):
    recorder = Recorder(RunInfo("quiet-otter", "script"))
    recorder.subscribe(StoreWriter(tmp_path))
    table = recorder.new_table(schema.STEP, schema.STEP_COLUMNS)
    for n in range(steps):
        values = np.full(len(schema.STEP_COLUMNS), np.nan, np.float32)
        recorder.record(StepRecord(n + 1, 1.0, "", ((table, values),)))
    recorder.end("crashed", "at once")
    assert recorder.close(240)
    page = page_of(tmp_path)
    assert "at once" in Reader(page).text
    assert_fetches_nothing(page)


def test_every_colour_has_a_light_and_a_dark_value(eventful):
    sheet = re.findall(r"<style>(.*?)</style>", page_of(eventful), re.DOTALL)[0]
    used = set(re.findall(r"var\(--([\w]+)\)", sheet))
    light, dark = sheet.split("@media (prefers-color-scheme: dark)", 1)
    for name in used:
        assert f"--{name}:" in light
        assert f"--{name}:" in dark


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.01, 0.013), (-5, 1e6), (3, 3), (1, 1000)])
def test_ticks_are_few_and_inside(low, high):
    found = ticks(low, high, False)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_refused_reports(tmp_path):
    assert_refused(call("report", "missing", cwd=home()), "there is no run missing")
    place = tmp_path / "folder"
    place.mkdir()
    assert_refused(call("report", "calm", "--output", place, cwd=home()), "cannot write")


TWO = """
import torch
from torch import nn

class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.judge = nn.Linear(3, 1)
    def forward(self, x):
        return self.judge(x)

maker, critic = nn.Sequential(nn.Linear(2, 3)), Critic()
one = torch.optim.Adam(maker.parameters())
two = torch.optim.SGD(critic.parameters(), lr=0.1)
for step in range(4):
    for optimizer in (one, two):
        optimizer.zero_grad()
        critic(maker(torch.randn(5, 2))).mean().backward()
        optimizer.step()
"""


def test_parameters_tables_named_are_in_it(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    assert call("run", "--name", "two", "two.py", cwd=tmp_path).returncode == 0
    page = call("report", "two", "--output", "-", cwd=tmp_path).stdout
    rows = re.findall(r'<tr><td class="m">([^<]+)</td><td class="n">([^<]+)</td>', page)
    assert {name for name, _ in rows} == {
        "maker.0.weight", "maker.0.bias", "critic.judge.weight", "critic.judge.bias",
    }  # fmt: skip
    assert all(float(highest) >= 0 for _, highest in rows)
