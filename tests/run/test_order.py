"""The lines of a run are in the order of its steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tui_trainer.protocol.actions import Pause, Resume
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.messages import Poll

_spec = importlib.util.spec_from_file_location("hosting", Path(__file__).parent / "test_host.py")
hosting = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hosting)
place = hosting.place


def test_lines_of_a_task_come_in_the_order_of_their_steps(place):
    place.gpt(steps=30, eval_every=10, sample_every=5, checkpoint_every=7)
    status, lines, _ = place.lines()
    assert status == 0
    ordered = [line for line in lines if line["type"] in ("step", "validation", "sample", "event")]
    assert {line["type"] for line in ordered} == {"step", "validation", "sample", "event"}
    kinds = {line["kind"] for line in hosting.of("event", ordered)}
    assert {"checkpoint", "evaluation"} <= kinds
    steps = [line["step"] for line in ordered]
    assert steps == sorted(steps)
    # Within one step its own line is the first.
    seen = 0
    for line in ordered:
        seen = line["step"] if line["type"] == "step" else seen
        assert line["step"] == seen


def test_a_pause_is_recorded_at_the_step_where_it_was_given(place):
    place.loop(steps=10_000_000)
    process = place.process()
    viewer = place.viewer()
    viewer.wait(lambda status: status.step > 3)
    for _ in range(5):
        viewer.do(Resume())
        at = viewer.status.step
        viewer.wait(lambda status, at=at: status.step > at + 50)
        assert viewer.do(Pause()).ok
        viewer.wait(lambda status: status.state == "paused")
        events = [e for e in viewer.ask(Poll(budget=1 << 20)).events if isinstance(e, Notice)]
        given = [event.step for event in events if event.text == "pause"]
        assert viewer.status.step - 1 <= given[-1] <= viewer.status.step
    process.kill()
    process.wait()
