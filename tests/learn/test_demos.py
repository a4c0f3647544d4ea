"""Guided runs: the finding comes, the breakpoint stops there, and the cure cures."""

from __future__ import annotations

import importlib

import pytest
import torch

from tui_trainer.config.run_spec import RunSpec
from tui_trainer.findings.engine import FindingsEngine
from tui_trainer.findings.finding_order import newest_findings
from tui_trainer.findings.rules import RULES
from tui_trainer.learn.demos import DEMOS, Demo
from tui_trainer.probes import PROBES
from tui_trainer.protocol.messages import Breakpoint, Poll
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.breakpoints import RunBreakpoints
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer
from tui_trainer.ui.screens import SCREENS

STEPS = {
    "shuffled-labels": 310,
    "rate-low": 130,
    "bad-batch": 115,
    "exploding": 40,
    "fp16-overflow": 90,
}
"""As few as the finding needs; others make 60."""
CURED_LOSS = {"shuffled-labels": 0.5, "bad-batch": 0.5, "exploding": 0.09, "fp16-overflow": 2.2}
"""What the cured loss is below after these steps; others are below 1.8."""


def run(demo: Demo, cured: bool, tmp_path) -> tuple[float, set[str], int]:
    """The last loss, the rules that found something, and how often the breakpoint was hit."""
    steps = STEPS.get(demo.name, 60)
    recorder, gate, faults = Recorder(RunInfo(name="run", task="script")), Gate(), []
    recorder.evaluate_with(FindingsEngine(on_fault=faults.append))
    condition = Breakpoint(1, demo.breakpoint, log_only=True)
    spec = RunSpec(name="run", directory=str(tmp_path), task="script", breakpoints=(condition,))
    breakpoints = RunBreakpoints(spec, gate, recorder)
    script = importlib.import_module(f"tui_trainer.learn.demos.{demo.script.stem}")
    try:
        with Tracer(recorder, gate, PROBES, ProbeOptions(budget=0.0)):
            loss = script.train(cured, steps)
        events, first = [], 0
        while (update := recorder.update_for(Poll(event=first))).events:
            events += update.events
            first = events[-1].id + 1
    finally:
        recorder.close()
    assert not faults
    (found,) = breakpoints.all.list()
    assert not found.fault
    return loss, {finding.rule for finding in newest_findings(events)}, found.hits


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.name)
def test_the_finding_comes_and_the_cure_cures(demo, tmp_path):
    loss, rules, hits = run(demo, False, tmp_path)
    assert demo.rule in rules
    assert hits > 0, demo.breakpoint
    cured_loss, cured_rules, cured_hits = run(demo, True, tmp_path)
    assert cured_rules == set()
    assert cured_hits == 0
    assert cured_loss < CURED_LOSS.get(demo.name, 1.8)
    if demo.name != "attention":  # whose alarm comes before the loss
        assert not cured_loss >= loss, "a nan is higher than any loss"


def test_the_catalogue_names_what_exists():
    rules, modes = {rule.name for rule in RULES}, {screen.mode for screen in SCREENS}
    for demo in DEMOS:
        assert demo.rule in rules
        assert demo.screen in modes
        assert demo.script.is_file()
        assert not demo.happens.endswith(".")
    scripts = {path.stem for path in DEMOS[0].script.parent.glob("*.py")} - {"__init__"}
    assert scripts == {demo.script.stem for demo in DEMOS}
