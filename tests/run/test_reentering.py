"""A signal handler runs on the main thread, in the middle of any other code."""

from __future__ import annotations

import io
import signal
import sys
import threading

import pytest

from tui_trainer.config.run_spec import RunSpec
from tui_trainer.run import signals as signalling
from tui_trainer.run.host import Host
from tui_trainer.run.signals import StopHandler
from tui_trainer.trace.gate import Gate, StopTraining


@pytest.fixture
def host(tmp_path):
    host = Host(RunSpec(name="r", directory=str(tmp_path), task="gpt"))
    yield host
    host.recorder.close()


def interrupted(monkeypatch, recorder, by, before):
    """Run `by` once, as a handler would, where the recorder records a pause."""
    original = recorder.pause_began
    handlers = [by]

    def pause_began():
        if before and handlers:
            handlers.pop()()
        original()
        if handlers:
            handlers.pop()()

    monkeypatch.setattr(recorder, "pause_began", pause_began)
    return handlers


@pytest.mark.parametrize("before", [True, False])
def test_a_signal_while_a_pause_is_recorded(monkeypatch, host, before):
    left = interrupted(monkeypatch, host.recorder, lambda: host.gate.stop(True), before)
    ended = []

    def train():
        try:
            host.gate.reached("step", 1)
        except StopTraining:
            ended.append("stopped")

    host.gate.pause()
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    thread.join(240)
    assert not thread.is_alive(), "the handler waits for the thread that it has interrupted"
    assert ended == ["stopped"]
    assert left == []
    assert not host.recorder.throughput.paused


class Busy(io.StringIO):
    """Standard error in the middle of a `print` of the script's."""

    def write(self, text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")


@pytest.mark.parametrize("closed", [False, True])
def test_ctrl_c_in_the_middle_of_a_print(monkeypatch, capfd, closed):
    gate = Gate()
    stops = StopHandler(gate)
    gate.reached("step", 1)
    monkeypatch.setattr(sys, "stderr", Busy())
    if closed:
        monkeypatch.setattr(signalling.os, "write", write_to_closed_pipe)
    stops._on_interrupt(signal.SIGINT, None)
    assert gate.mode == "stopping"
    monkeypatch.undo()
    printed = capfd.readouterr().err
    assert ("finishing the step" in printed) != closed


def write_to_closed_pipe(descriptor, data):
    raise OSError(9, "Bad file descriptor")
