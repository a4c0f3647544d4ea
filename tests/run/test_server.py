from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import struct
import time

import msgspec
import numpy as np
import pytest

from tui_trainer.history.records import StepRecord
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.actions import (
    Checkpoint,
    Mark,
    Pause,
    Resume,
    RunToEpochEnd,
    Step,
    StepPhase,
    Stop,
    TakeControl,
    Throttle,
)
from tui_trainer.protocol.framing import ConnectionClosed, encode, read_to_viewer
from tui_trainer.protocol.messages import Ack, Command, Hello, Join, Poll, Refused, Update, Welcome
from tui_trainer.protocol.schema import Column, RunInfo, Table
from tui_trainer.record.recorder import Recorder
from tui_trainer.run import server as connections
from tui_trainer.run.control import CommandHandler
from tui_trainer.run.server import Server
from tui_trainer.runs.security import connect_unix
from tui_trainer.trace.gate import Gate


class Rig:
    """A recorder, a gate and a server, without any training."""

    def __init__(self, path):
        self.recorder = Recorder(RunInfo(name="r", task="gpt"))
        self.gate = Gate()
        self.asked = []
        self.control = CommandHandler(
            self.gate,
            self.recorder,
            lambda checkpoint: self.asked.append(("stop", checkpoint)),
            lambda: self.asked.append(("checkpoint",)),
        )
        self.path = path
        self.server = Server("r", self.recorder, self.control)
        self.server.listen(path)

    def connect(self):
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(240)
        stream.connect(str(self.path))
        return stream

    def viewer(self, name="me@here", read_only=False):
        return Peer(self.connect(), name, read_only)

    def alive(self):
        with self.viewer("probe", read_only=True) as peer:
            return isinstance(peer.ask(Poll(budget=0)), Update)  # it need not be read at once

    def dropped(self):
        events = self.recorder.update_for(Poll()).events
        return [e.text for e in events if e.kind == "viewer"]


class Peer:
    def __init__(self, stream, name="me", read_only=False):
        self.stream = stream
        self.welcome = self.ask(Hello(PROTOCOL_VERSION, "0", name, read_only))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stream.close()

    def ask(self, message):
        self.stream.sendall(encode(message))
        return read_to_viewer(self.stream.recv)

    def do(self, action, identity=1):
        answer = self.ask(Command(identity, action))
        assert isinstance(answer, Ack)
        assert answer.id == identity
        return answer


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path / "run.sock")
    yield made
    made.server.close()
    made.recorder.close(240)


def wait_for(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def test_socket_is_private_and_removed(rig):
    assert stat.S_IMODE(rig.path.stat().st_mode) == 0o600
    rig.server.close()
    assert not rig.path.exists()


def test_a_socket_that_exists_listens(tmp_path, monkeypatch):
    """A viewer that finds it may connect at once."""
    seen = []

    class Watched(socket.socket):
        def listen(self, *arguments):
            seen.append([each.name for each in tmp_path.iterdir()])
            super().listen(*arguments)

    monkeypatch.setattr("tui_trainer.run.server.socket.socket", Watched)
    listening = connections._listen(tmp_path / "run.sock")
    try:
        assert seen == [["run.new"]]
        assert [each.name for each in tmp_path.iterdir()] == ["run.sock"]
        connect_unix(tmp_path / "run.sock").close()
    finally:
        listening.close()


def test_greeting_and_poll(rig):
    with rig.viewer() as peer:
        assert isinstance(peer.welcome, Welcome)
        update = peer.ask(Poll())
        assert update.info.name == "r"
        assert update.status.viewers == ("me@here",)
        assert update.status.controller == peer.welcome.viewer_id
    wait_for(lambda: rig.recorder.status.viewers == ())
    assert rig.recorder.status.controller is None


@pytest.mark.parametrize(
    "greeting",
    [Hello(PROTOCOL_VERSION + 1, "9.9", "me"), Join(PROTOCOL_VERSION + 1, "9.9", 1, 2, 7)],
    ids=["viewer", "rank"],
)
def test_another_version_is_refused_with_a_hint(rig, greeting):
    stream = rig.connect()
    stream.sendall(encode(greeting))
    answer = read_to_viewer(stream.recv)
    assert isinstance(answer, Refused)
    assert "9.9" in answer.reason
    assert answer.hint
    with pytest.raises(ConnectionClosed):
        read_to_viewer(stream.recv)


def test_commands_reach_the_gate_and_are_recorded(rig):
    rig.gate.steps_per_epoch = 10
    with rig.viewer() as peer:
        assert peer.do(Pause()).ok
        assert rig.gate.pause_requested
        assert peer.do(Step(5)).ok
        assert rig.gate.run_to == 5
        assert peer.do(RunToEpochEnd()).ok
        assert rig.gate.run_to == 10
        assert peer.do(Throttle(2.5)).ok
        assert rig.gate.rate == 2.5
        assert peer.do(Throttle(None)).ok
        assert peer.do(StepPhase()).ok
        assert peer.do(Resume()).ok
        assert peer.do(Checkpoint()).ok
        assert peer.do(Stop(checkpoint=True)).ok
        assert peer.do(Mark("here\x1b[2J")).ok
        events = peer.ask(Poll()).events
    assert rig.asked == [("checkpoint",), ("stop", True)]
    assert [e.kind for e in events] == ["command"] * 9 + ["mark"]
    assert {e.who for e in events} == {"me@here"}
    assert "\x1b" not in events[-1].text


@pytest.mark.parametrize(
    "action",
    [
        *(Step(0), Step(-1), Step(2**62)),
        *(Throttle(0.0), Throttle(-1.0), Throttle(float("nan")), Throttle(float("inf"))),
        *(RunToEpochEnd(), Mark(""), Mark("\x00")),
    ],
)
def test_absurd_commands_are_refused_with_a_reason(rig, action):
    with rig.viewer() as peer:
        answer = peer.do(action)
        assert not answer.ok
        assert answer.message
        assert not rig.gate.armed


def test_control_is_held_by_one_and_taken_explicitly(rig):
    with rig.viewer("first") as first, rig.viewer("second") as second:
        refused = second.do(Pause())
        assert (refused.ok, refused.message) == (False, "first holds control")
        assert second.do(Mark("a watcher may mark")).ok
        assert second.do(TakeControl()).ok
        assert second.do(Pause()).ok
        assert not first.do(Resume()).ok
        assert rig.recorder.status.controller == second.welcome.viewer_id
    wait_for(lambda: not rig.recorder.status.viewers)


def test_free_control_goes_to_the_next_viewer_that_uses_it(rig):
    with rig.viewer("first") as first, rig.viewer("second") as second:
        first.stream.close()
        wait_for(lambda: rig.recorder.status.controller is None)
        assert second.do(Pause()).ok
        assert rig.recorder.status.controller == second.welcome.viewer_id


def test_a_read_only_viewer_never_controls(rig):
    with rig.viewer("watcher", read_only=True) as peer:
        assert rig.recorder.status.controller is None
        for action in (Pause(), TakeControl(), Stop(), Mark("x")):
            assert not peer.do(action).ok
    assert rig.asked == []


def test_a_run_that_has_ended_refuses_commands_and_still_answers(rig):
    rig.recorder.end("finished")
    with rig.viewer() as peer:
        answer = peer.do(Pause())
        assert not answer.ok
        assert "finished" in answer.message
        assert peer.ask(Poll()).status.ended
        assert rig.server.wait_until_seen(240)


def hostile_frames():
    rng = random.Random(7)
    hello = encode(Hello(PROTOCOL_VERSION, "0", "x"))
    yield rng.randbytes(500)
    yield b"\x00\x00\x00\x00"
    yield struct.pack(">I", 2**32 - 1) + b"x" * 100
    yield struct.pack(">I", 64 * 1024 + 1) + b"x" * 100
    yield hello[:-3]
    yield hello[:2]
    yield struct.pack(">I", 60_000) + b"\x91" * 60_000  # nested arrays
    yield encode(Poll())
    yield encode(Command(1, Stop()))
    yield hello + hello
    yield hello + rng.randbytes(300)
    yield hello + struct.pack(">I", 2**31)
    body = msgspec.msgpack.encode({"type": "poll", "rows": "text", "budget": []})
    yield hello + struct.pack(">I", len(body)) + body
    body = msgspec.msgpack.encode({"type": "command", "id": 1, "action": {"type": "rm -rf"}})
    yield hello + struct.pack(">I", len(body)) + body
    body = msgspec.msgpack.encode({"type": "poll", "event": 2**64 - 1, "watch": ["a" * 60_000]})
    yield hello + struct.pack(">I", len(body)) + body
    for _ in range(60):
        whole = bytearray(hello + encode(Poll(rows=(1, 2, 3))) + encode(Command(3, Step(2))))
        for _ in range(rng.randrange(1, 6)):
            whole[rng.randrange(len(whole))] = rng.randrange(256)
        yield bytes(whole)


def test_hostile_bytes_never_hurt(rig):
    for frame in hostile_frames():
        stream = rig.connect()
        with contextlib.suppress(OSError):
            stream.sendall(frame)
            stream.shutdown(socket.SHUT_WR)
            while stream.recv(65536):
                pass
        stream.close()
    assert rig.alive()
    assert 1 <= len(rig.dropped()) <= 20
    wait_for(lambda: not rig.server._connections)


def test_a_stuck_viewer_is_dropped_and_the_others_are_served(rig, monkeypatch):
    monkeypatch.setattr(connections, "SEND_TIMEOUT_S", 0.3)
    columns = tuple(Column(f"p{i}") for i in range(5000))
    rig.recorder.declare([Table(0, "grad_norm", columns)])
    for number in range(1, 101):
        row = (0, np.zeros(5000, np.float32))
        rig.recorder.record(StepRecord(number, 1.0, "", (row,)))
    with rig.viewer("stuck") as stuck:
        for _ in range(20):  # asks and asks, and reads nothing
            with contextlib.suppress(OSError):
                stuck.stream.sendall(encode(Poll(budget=2**22)))
        assert rig.alive()
        wait_for(lambda: any("read nothing" in text for text in rig.dropped()))
        assert rig.alive()


def test_a_silent_connection_is_dropped(rig, monkeypatch):
    monkeypatch.setattr(connections, "GREETING_TIMEOUT_S", 0.2)
    stream = rig.connect()
    assert stream.recv(10) == b""
    assert any("no greeting" in text for text in rig.dropped())


def test_any_number_of_viewers_up_to_the_bound(rig):
    peers = [rig.viewer(f"v{i}") for i in range(64)]
    assert all(isinstance(peer.ask(Poll()), Update) for peer in peers)
    answer = read_to_viewer(rig.connect().recv)
    assert isinstance(answer, Refused)
    for peer in peers:
        peer.stream.close()


def test_a_socketpair_serves_the_home_in_the_app(rig):
    ours, theirs = socket.socketpair()
    rig.server.serve(theirs)
    ours.settimeout(240)
    with Peer(ours) as peer:
        assert isinstance(peer.ask(Poll()), Update)


def test_a_forked_child_holds_no_connection_open(rig):
    with rig.viewer() as peer:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write_end)
            os.read(read_end, 1)  # lives on until the parent lets it go
            os._exit(0)
        os.close(read_end)
        rig.server.close()
        assert peer.stream.recv(10) == b""  # the end is seen although the child lives
        with pytest.raises(OSError):  # noqa: PT011 - refused or missing, by platform
            rig.connect()
        os.close(write_end)
        os.waitpid(child, 0)


told_by_the_kernel = pytest.mark.skipif(
    not hasattr(socket, "SO_PEERCRED"), reason="this system has no peer credentials"
)


def speaks_for(monkeypatch, user):
    """Make the kernel's answer: every peer's process belongs to this user."""
    asked = socket.socket.getsockopt

    class Stream(socket.socket):
        def getsockopt(self, level, option, *size):
            if option == socket.SO_PEERCRED:
                return struct.pack("3i", 1, user, user)
            return asked(self, level, option, *size)

    monkeypatch.setattr(socket, "socket", Stream)


@told_by_the_kernel
def test_peers_must_be_of_the_same_user(tmp_path, monkeypatch):
    """Whatever the mode of the socket: another user's process may have been handed it."""
    speaks_for(monkeypatch, os.getuid() + 12345)
    rig = Rig(tmp_path / "run.sock")
    try:
        stream = rig.connect()
        with contextlib.suppress(OSError):  # it need not wait for a greeting
            stream.sendall(encode(Hello(PROTOCOL_VERSION, "0", "me", True)))
        answer = read_to_viewer(stream.recv)
        assert isinstance(answer, Refused)
        assert answer.reason == "this run belongs to another user"
        with contextlib.suppress(ConnectionResetError):
            assert stream.recv(1) == b""
        wait_for(rig.dropped)
        assert "a connection from another user was refused" in rig.dropped()[0]
    finally:
        rig.server.close()
        rig.recorder.close(240)


@told_by_the_kernel
@pytest.mark.parametrize("user", [0, os.getuid()])
def test_root_and_the_owner_may_connect(tmp_path, monkeypatch, user):
    speaks_for(monkeypatch, user)
    rig = Rig(tmp_path / "run.sock")
    try:
        assert rig.alive()
    finally:
        rig.server.close()
        rig.recorder.close(240)
