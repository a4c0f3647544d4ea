"""`--alert`: what is reported, how often, and what happens when it cannot be delivered."""

from __future__ import annotations

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import pytest

from tests.cli.calling import assert_refused, call
from tui_trainer.history.records import StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import Finding, Notice
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo, Table
from tui_trainer.record import alerts
from tui_trainer.record.alerts import MAX_PER_MINUTE, Alert, AlertError, AlertSink, Sender
from tui_trainer.record.sink_items import RunEnded, StepRecorded

DEADLINE_S = 120.0
INFO = RunInfo("quiet-otter", "gpt", tables=(Table(0, schema.STEP, schema.STEP_COLUMNS),))


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.05)
    return found


def finding(number, level="warning", cause=None, step=5):
    return Finding(
        0, step, 1.0, number, "exploding", level, step, "gradients explode", "norm 1e9", "clip",
        cause=cause,
    )  # fmt: skip


class Recorded:
    """An AlertSink that writes into a pipe of the test."""

    def __init__(self, monkeypatch):
        self.read, write = os.pipe()
        os.set_blocking(write, False)
        os.set_blocking(self.read, False)
        monkeypatch.setattr(alerts, "start_sender", lambda targets, info: write)
        self.now = 1000.0
        self.sink = AlertSink(["true"], INFO, clock=lambda: self.now)

    def take(self, *items):
        """The alerts that these items caused."""
        self.sink.take(items, Status())
        try:
            data = os.read(self.read, 1 << 20)
        except BlockingIOError:
            return []
        return [msgspec.json.decode(line, type=Alert) for line in data.splitlines()]


@pytest.fixture
def recorded(monkeypatch):
    made = Recorded(monkeypatch)
    yield made
    made.sink.close()
    os.close(made.read)


def test_a_finding_is_reported_once_and_again_when_it_gets_worse(recorded):
    assert recorded.take(finding(0, "info")) == []
    (first,) = recorded.take(finding(0, "warning"))
    assert (first.kind, first.level, first.run) == ("finding", "warning", "quiet-otter")
    assert first.text == "quiet-otter: gradients explode: norm 1e9"
    assert first.finding["rule"] == "exploding"
    assert recorded.take(finding(0, "warning", step=9)) == []
    (worse,) = recorded.take(finding(0, "error"))
    assert worse.level == "error"
    assert recorded.take(finding(1, "error", cause=0)) == []


def test_breakpoints_that_pause_are_reported(recorded):
    notice = Notice(
        0, 7, 1.0, kind="breakpoint", level="warning", text="paused after loss at loss > 3"
    )
    (alert,) = recorded.take(notice)
    assert (alert.kind, alert.step) == ("breakpoint", 7)
    logged = msgspec.structs.replace(notice, level="info")
    assert recorded.take(logged, msgspec.structs.replace(notice, kind="state")) == []


@pytest.mark.parametrize(
    ("state", "kind", "loss", "text"),
    [
        ("finished", "end", 1.5, "quiet-otter: finished after step 12, loss 1.500"),
        ("crashed", "crash", np.nan, "quiet-otter: crashed at step 12: boom"),
        ("stopped", "end", np.inf, "quiet-otter: stopped after step 12, loss inf"),
    ],
)
def test_the_end_is_reported(recorded, state, kind, loss, text):
    row = np.array([loss, 1e-3, 1, 10, 0], np.float32)
    step = StepRecorded(StepRecord(12, 1.0, "", ((0, row),)))
    reason = "boom" if state == "crashed" else ""
    (alert,) = recorded.take(step, RunEnded(Status(state=state, step=12, reason=reason)))
    assert (alert.kind, alert.state, alert.text) == (kind, state, text)
    assert alert.loss == (1.5 if state == "finished" else None)
    assert alert.loss_text == {"crashed": "nan", "stopped": "inf"}.get(state)


def test_alerts_per_minute_are_limited_except_for_the_end(recorded):
    many = recorded.take(*(finding(number) for number in range(MAX_PER_MINUTE + 7)))
    assert len(many) == MAX_PER_MINUTE
    (end,) = recorded.take(RunEnded(Status(state="finished", step=1)))
    assert end.left_out == 7
    recorded.now += 61
    (later,) = recorded.take(finding(100))
    assert later.left_out == 0


def test_a_full_pipe_is_not_waited_for(recorded):
    for number in range(3000):
        recorded.now += 61
        recorded.sink.take([finding(number)], Status())
    assert len(os.read(recorded.read, 1 << 20)) > 1000


# ---------------------------------------------------------------- the process that sends


class Webhook(BaseHTTPRequestHandler):
    """Answers with `answers`, then with 200."""

    answers: ClassVar[list[int]]
    bodies: ClassVar[list[dict]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.append(json.loads(body))
        self.send_response(self.answers.pop(0) if self.answers else 200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def webhook():
    class Handler(Webhook):
        answers: ClassVar[list[int]] = []
        bodies: ClassVar[list[dict]] = []

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Handler.url = f"http://127.0.0.1:{server.server_port}/secret"
    yield Handler
    server.shutdown()
    server.server_close()


def send(tmp_path, targets, *sent):
    """Run a Sender in this process until it has sent these alerts."""
    read, write = os.pipe()
    os.write(write, b"".join(msgspec.json.encode(alert) + b"\n" for alert in sent))
    os.close(write)
    try:
        Sender("quiet-otter", tmp_path, os.getpid(), targets).run(read)
    finally:
        os.close(read)
    return (tmp_path / alerts.LOG_FILE).read_text().splitlines()


END = Alert(kind="end", run="quiet-otter", text="quiet-otter: finished", state="finished")


def test_a_webhook_is_called_again_when_it_fails(tmp_path, webhook, monkeypatch):
    monkeypatch.setattr(alerts, "RETRY_AFTER_S", (0.0, 0.0))
    webhook.answers += [503, 429, 200]
    (line,) = send(tmp_path, [webhook.url], END)
    assert line.endswith(f"end to {webhook.url.split('/')[2]}: sent")
    assert "secret" not in line
    assert [body["text"] for body in webhook.bodies] == ["quiet-otter: finished"] * 3


def test_a_refused_call_is_not_repeated(tmp_path, webhook, monkeypatch):
    monkeypatch.setattr(alerts, "RETRY_AFTER_S", (0.0, 0.0))
    webhook.answers += [404]
    (line,) = send(tmp_path, [webhook.url], END)
    assert "failed: status 404" in line
    assert len(webhook.bodies) == 1


def test_a_target_that_hangs_does_not_delay_the_others(tmp_path, webhook, monkeypatch):
    monkeypatch.setattr(alerts, "TIMEOUT_S", 2.0)
    monkeypatch.setattr(alerts, "RETRY_AFTER_S", ())
    done = tmp_path / "done"
    slow = f"while ! test -e {done}; do sleep 0.05; done; exit 9"
    thread = threading.Thread(target=send, args=(tmp_path, [slow, webhook.url], END))
    thread.start()
    wait_for(lambda: webhook.bodies)
    done.touch()
    thread.join()


def test_a_command_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(alerts, "RETRY_AFTER_S", (0.0,))
    (line,) = send(tmp_path, ["no-such-command"], END)
    assert "failed: exit status 127" in line
    assert "attempt 1" in line


def test_a_command_has_the_alert_in_its_environment_and_input(tmp_path):
    out = tmp_path / "out"
    alert = msgspec.structs.replace(END, level="error", step=7, directory="/runs/x")
    names = ("", "_KIND", "_LEVEL", "_RUN", "_DIRECTORY", "_STEP")
    shown = "|".join(f"$TUI_TRAINER_ALERT{name}" for name in names)
    send(tmp_path, [f'cat > {out}; echo >> {out}; echo "{shown}" >> {out}'], alert)
    given, environment = out.read_text().splitlines()
    assert msgspec.json.decode(given, type=Alert) == alert
    assert environment == "quiet-otter: finished|end|error|quiet-otter|/runs/x|7"


def test_errors_say_what_happened(monkeypatch):
    with monkeypatch.context() as impatient:
        impatient.setattr(alerts, "TIMEOUT_S", 0.2)
        with pytest.raises(AlertError, match="still running"):
            alerts.deliver("exec sleep 600", END, b"{}")
    monkeypatch.setattr(alerts, "TIMEOUT_S", 240.0)
    with pytest.raises(AlertError, match="exit status 3: oh no"):
        alerts.deliver("echo oh no >&2; exit 3", END, b"{}")
    with pytest.raises(AlertError):
        alerts.deliver("http://127.0.0.1:1/", END, b"{}")


# ---------------------------------------------------------------- the whole

SCRIPT = """
import os, sys, time, torch
from torch import nn
net = nn.Linear(4, 2)
optimizer = torch.optim.SGD(net.parameters(), 0.05)
for step in range(30):
    net(torch.randn(8, 4)).square().mean().backward()  # without zero_grad
    optimizer.step()
    if step == 20 and sys.argv[1] == "crash":
        raise RuntimeError("boom")
    if step == 20 and sys.argv[1] == "kill":
        while not os.path.exists(sys.argv[2]):  # the finding has been reported
            time.sleep(0.05)
        os.kill(os.getpid(), 9)
try:
    os.waitpid(-1, 0)
    print("a child that the script does not know")
except ChildProcessError:
    print("no children")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["end", "crash", "kill"])
def test_a_run_reports_its_finding_and_its_end(tmp_path: Path, how: str) -> None:
    script, out = tmp_path / "train.py", tmp_path / "out"
    script.write_text(SCRIPT)
    target = f"cat >> {out}; echo >> {out}"
    arguments = ["run", "--plain", "--name", "r", "--alert", target, script, how, out]
    done = call(*arguments, cwd=tmp_path)
    if how == "end":
        assert "no children" in done.stdout

    def read():
        if not out.exists():
            return None
        lines = [json.loads(line) for line in out.read_text().splitlines() if line]
        return lines if len(lines) == 2 else None

    found, end = wait_for(read)
    assert (found["kind"], found["level"]) == ("finding", "error")
    assert found["finding"]["rule"] == "gradients-kept"
    assert end["kind"] == ("end" if how == "end" else "crash")
    assert end["state"] == {"end": "finished", "crash": "crashed", "kill": "killed"}[how]
    if how == "crash":
        assert "RuntimeError: boom" in end["text"]


@pytest.mark.parametrize("target", ["", "ftp://example.org/x", "http://"])
def test_targets_that_cannot_work_are_refused(tmp_path, target):
    assert_refused(call("gpt", "--alert", target, cwd=tmp_path), "--alert cannot")
