"""A session with the real server and recorder."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import numpy as np
import pytest

from tests.client.scripted import until
from tests.run.test_server import Rig
from tui_trainer.client import live
from tui_trainer.client.connection import connector
from tui_trainer.client.live import LiveSession
from tui_trainer.history.records import StepRecord
from tui_trainer.protocol.actions import Mark, Pause, Resume
from tui_trainer.protocol.schema import Column, Table
from tui_trainer.runs.security import connect_unix

COLUMNS = 30


@pytest.fixture
def rig(tmp_path):
    tmp_path.chmod(0o700)
    made = Rig(tmp_path / "run.sock")
    made.table = Table(0, "grad_norm", tuple(Column(f"p{i}") for i in range(COLUMNS)))
    made.recorder.declare([made.table])
    made.step = 0
    yield made
    made.server.close()
    made.recorder.close(240)


def record(rig, count):
    for _ in range(count):
        rig.step += 1
        values = np.full(COLUMNS, rig.step, np.float32)
        rows = ((rig.table.id, values),)
        rig.recorder.record(StepRecord(rig.step, time.time(), "", rows))
        rig.recorder.log("stdout", f"step {rig.step}")
        if rig.step % 500 == 0:
            rig.recorder.flush(240)


def until_seen(session, rig):
    def all_seen():
        table = session.poll().history.table("grad_norm")
        return table is not None and table.rows == rig.step and len(session.poll().log) == rig.step

    until(all_seen)
    table = session.poll().history.table("grad_norm")
    window = table.window([0], 1, rig.step + 1, 10)
    assert window.low[0, 0] == 1
    assert window.high[-1, 0] == rig.step
    assert [line.id for line in session.poll().log] == list(range(rig.step))


def test_commands_and_the_end_of_a_run(rig):
    session = LiveSession(connector(lambda: connect_unix(rig.path)), viewer="me@here")
    session.set_rate(100)
    record(rig, 40)
    until_seen(session, rig)
    assert session.send(Pause()).result(240).ok
    assert session.send(Mark("look")).result(240).ok
    until(lambda: any(event.kind == "mark" for event in session.poll().events))
    assert session.send(Resume()).result(240).ok
    assert any("me@here" in name for name in session.poll().status.viewers)
    record(rig, 1500)
    rig.recorder.end("finished", "all steps made")
    until(lambda: session.poll().link.state == "closed")
    until_seen(session, rig)
    assert session.poll().status.state == "finished"
    assert rig.server.wait_until_seen(240)


def test_a_late_viewer_and_a_read_only_one(rig):
    record(rig, 3000)
    early = LiveSession(connector(lambda: connect_unix(rig.path)))
    until_seen(early, rig)
    watcher = LiveSession(connector(lambda: connect_unix(rig.path)), read_only=True)
    until_seen(watcher, rig)
    assert watcher.poll().link.read_only
    refused = watcher.send(Pause()).result(240)
    assert not refused.ok
    assert refused.message
    for session in (early, watcher):
        session.close()


def test_no_gap_after_broken_connections(rig, monkeypatch):
    monkeypatch.setattr(live, "FIRST_BACK_OFF_S", 0.01)
    sockets = []

    def connect():
        sockets.append(connect_unix(rig.path))
        return sockets[-1]

    session = LiveSession(connector(connect))
    session.set_rate(100)

    def live_again(broken):
        """While the next connection is made, steps are recorded; no more than a viewer keeps."""
        if rig.step < 4000:
            record(rig, 20)
        return session.poll().link.state == "live" and len(sockets) > broken

    for broken in range(6):
        until(lambda broken=broken: live_again(broken))
        record(rig, 20)
        with (  # a connection that has been lost already has no descriptor
            contextlib.suppress(OSError),
            socket.socket(fileno=os.dup(sockets[-1].fileno())) as copy,
        ):
            copy.shutdown(socket.SHUT_RDWR)
    until_seen(session, rig)
    assert len(sockets) >= 6
    session.close()
