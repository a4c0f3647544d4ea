"""A peer may send anything: the run continues, and other peers are served."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.run.test_server import Rig, wait_for
from tui_trainer.history.records import StepRecord
from tui_trainer.protocol import PHASES, PROTOCOL_VERSION
from tui_trainer.protocol.actions import (
    Action,
    AddBreakpoint,
    Back,
    ChangeBreakpoint,
    ChangeSettings,
    DeleteBreakpoint,
    KeepSnapshots,
    Mark,
    Pause,
    Step,
    Throttle,
)
from tui_trainer.protocol.events import TextSample
from tui_trainer.protocol.framing import MAX_TO_RUN_BYTES, FrameBuffer, encode
from tui_trainer.protocol.messages import Ack, Command, Hello, Poll, Refused, Update, Welcome
from tui_trainer.protocol.schema import Column, ParameterInfo, Table
from tui_trainer.protocol.settings import SettingChange
from tui_trainer.run import server as connections
from tui_trainer.run.control import CommandHandler
from tui_trainer.trace.gate import StopTraining

HELLO = encode(Hello(PROTOCOL_VERSION, "0", "fuzz"))
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[5n\x9b31m"


class Trained(Rig):
    """A rig with a thread that passes the gate endlessly, as a training does."""

    def __init__(self, path):
        super().__init__(path)
        self.control = CommandHandler(self.gate, self.recorder, self.gate_stop, lambda: None)
        self.server._control = self.control
        self.gate.steps_per_epoch = 10
        self.recorder.declare([Table(0, "step", (Column("loss"),))])
        self.fault = None
        self.steps = 0
        self.ending = False
        self.thread = threading.Thread(target=self.train, daemon=True)
        self.thread.start()

    def gate_stop(self, checkpoint):
        """Ignore a viewer's stop, so that the fuzzing continues."""

    def train(self):
        try:
            while not self.ending:
                self.steps += 1
                for phase in PHASES:
                    self.gate.reached(phase, self.steps)
                row = (0, np.ones(1, np.float32))
                self.recorder.record(StepRecord(self.steps, time.time(), "", (row,)))
                time.sleep(0.0005)
        except StopTraining:
            pass
        except BaseException as fault:
            self.fault = fault

    def continues(self):
        """Whether it trains once every pause and throttle is lifted."""
        self.gate.throttle(None)
        self.gate.resume()
        before = self.steps
        wait_for(lambda: self.fault or self.steps > before + 3)
        return self.fault is None

    def end(self):
        self.ending = True
        self.gate.resume()
        self.thread.join(240)
        self.server.close()
        self.recorder.close(240)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = Trained(tmp_path_factory.mktemp("hostile") / "run.sock")
    yield made
    made.end()


def send(rig, data):
    """Send `data`; the run's answers until either side closes the connection."""
    stream = rig.connect()
    frames, answers = FrameBuffer(), []
    with contextlib.suppress(OSError), stream:
        sender = threading.Thread(target=_send_all, args=(stream, data), daemon=True)
        sender.start()
        while received := stream.recv(1 << 16):
            answers += frames.feed(received)
        sender.join(240)
    return answers


def _send_all(stream, data):
    with contextlib.suppress(OSError):
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)


def check(rig):
    assert rig.continues(), repr(rig.fault)
    assert rig.alive()
    assert rig.thread.is_alive()
    wait_for(lambda: not rig.server._connections)


SETTINGS = settings(
    max_examples=examples(60),
    suppress_health_check=list(HealthCheck),
)

big = st.integers(-(2**63), 2**64 - 1)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
leaves = st.none() | st.booleans() | big | st.floats() | words | st.binary(max_size=50)
anything = st.recursive(
    leaves, lambda kids: st.lists(kids, max_size=6) | st.dictionaries(words, kids, max_size=4)
)
tags = st.sampled_from(["hello", "poll", "command", "update", "ack", "step", "throttle", "mark"])


def framed(payload):
    return struct.pack(">I", len(payload)) + payload


shapes = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda n, tail: struct.pack(">I", n) + tail, st.integers(0, 2**32 - 1), st.binary()),
    st.builds(lambda value: framed(msgspec.msgpack.encode(value)), anything),
    st.builds(
        lambda tag, rest: framed(msgspec.msgpack.encode([tag, *rest])),
        tags,
        st.lists(anything, max_size=9),
    ),
)


@SETTINGS
@given(greets=st.booleans(), parts=st.lists(shapes, min_size=1, max_size=5), cut=st.integers(0, 99))
def test_bytes_that_are_no_protocol(trained, greets, parts, cut):
    data = (HELLO if greets else b"") + b"".join(parts)
    answers = send(trained, data[: len(data) - cut] if cut < 20 else data)
    assert all(isinstance(each, (Welcome, Refused, Update, Ack)) for each in answers)
    check(trained)


@SETTINGS
@given(
    polls=st.lists(
        st.builds(
            Poll,
            revision=st.integers(-(2**63), 2**63),
            rows=st.lists(st.integers(-(2**63), 2**64 - 1), max_size=50).map(tuple),
            event=big,
            log=big,
            artifact=big,
            report=st.none() | st.tuples(big, st.sampled_from(PHASES)),
            watch=st.lists(words | st.just("attention_heads"), max_size=20).map(tuple),
            budget=big,
        ),
        min_size=1,
        max_size=6,
    )
)
def test_polls_that_are_valid_but_absurd(trained, polls):
    data = HELLO + b"".join(map(encode, polls))
    answers = send(trained, data)
    assert len(answers) == 1 + len(polls)
    check(trained)


setting_changes = st.builds(SettingChange, group=st.none() | big)
WITH_FIELDS = (
    Step,
    Throttle,
    Mark,
    AddBreakpoint,
    ChangeBreakpoint,
    DeleteBreakpoint,
    Back,
    KeepSnapshots,
    ChangeSettings,
)


@SETTINGS
@given(
    actions=st.lists(
        st.one_of(
            st.builds(Step, big),
            st.builds(Throttle, st.none() | st.floats()),
            st.builds(Mark, words),
            st.builds(AddBreakpoint, words, big),
            st.builds(ChangeBreakpoint, big, st.none() | st.booleans(), st.none() | big),
            st.builds(DeleteBreakpoint, big),
            st.builds(Back, st.none() | big),
            st.builds(KeepSnapshots, big),
            st.builds(ChangeSettings, st.lists(setting_changes, max_size=3).map(tuple)),
            *(st.builds(kind) for kind in Action.__args__ if kind not in WITH_FIELDS),
        ),
        min_size=1,
        max_size=8,
    ),
    identity=big,
)
def test_commands_that_are_valid_but_absurd(trained, actions, identity):
    data = HELLO + b"".join(encode(Command(identity, action)) for action in actions)
    answers = send(trained, data)
    assert [type(each) for each in answers] == [Welcome] + [Ack] * len(actions)
    check(trained)


def test_a_million_cursors_and_topics(trained):
    for poll in (
        Poll(rows=(2**40,) * 1_000_000),
        Poll(watch=("x" * 1000,) * 100_000),
        Poll(watch=("\x00" * 60_000,)),
        Poll(rows=(0,) * 60_000, budget=2**60),
    ):
        answers = send(trained, HELLO + encode(poll, 1 << 30))
        dropped = len(encode(poll, 1 << 30)) > MAX_TO_RUN_BYTES
        assert len(answers) == (1 if dropped else 2)
    check(trained)


@pytest.mark.parametrize("rate", [1e-300, 5e-324, 1e-9, -0.0, 1e300])
def test_no_rate_stops_the_training_for_good(trained, rate):
    with trained.viewer() as peer:
        assert not peer.do(Throttle(rate)).ok
    check(trained)


def test_step_counts_never_overflow(trained):
    with trained.viewer() as peer:
        assert peer.do(Pause()).ok
        wait_for(lambda: trained.gate.mode == "paused")
        assert peer.do(Step(10**12 - trained.gate.completed)).ok
        assert not peer.do(Step(10**12)).ok
        assert not peer.do(Step(10**18)).ok
    check(trained)


def test_no_escape_sequence_gets_through(rig):
    hostile = (ESCAPES + "\r\n" + "\x00" * 10) * 3000
    with rig.viewer(ESCAPES + "me", read_only=False) as peer:
        assert peer.do(Mark(hostile[:60_000])).ok
        for data in (
            framed(msgspec.msgpack.encode([ESCAPES])),
            encode(Hello(99, ESCAPES, ESCAPES)),
            HELLO + framed(msgspec.msgpack.encode(["command", 1, {"type": ESCAPES}])),
        ):
            send(rig, data)
        rig.recorder.log("stdout", ESCAPES)
        rig.recorder.fault(ESCAPES, ValueError(ESCAPES + "\udcff"))
        rig.recorder.set_status(reason=ESCAPES)
        rig.recorder.describe(title=ESCAPES, facts={ESCAPES: ESCAPES})
        update = peer.ask(Poll())
    text = msgspec.json.encode(msgspec.to_builtins(update), enc_hook=str).decode()
    for escaped in ("\\u001b", "\\u0007", "\\u0000", "\x9b", "\x7f"):
        assert escaped not in text
    assert len([e for e in update.events if e.kind == "viewer"]) == 3
    assert "owned" in text


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path / "run.sock")
    yield made
    made.server.close()
    made.recorder.close(240)


def test_half_a_message_and_a_viewer_that_fell_silent(rig, monkeypatch):
    monkeypatch.setattr(connections, "FRAME_TIMEOUT_S", 0.2)
    half = rig.viewer("half")
    half.stream.sendall(encode(Poll())[:3])
    wait_for(lambda: any("middle of a message" in text for text in rig.dropped()))
    monkeypatch.setattr(connections, "IDLE_TIMEOUT_S", 1.0)
    silent = rig.viewer("silent")
    wait_for(lambda: any("sent nothing for 1 s" in text for text in rig.dropped()))
    wait_for(lambda: rig.recorder.status.viewers == ())
    assert rig.recorder.status.controller is None
    for peer in (half, silent):
        peer.stream.close()


@pytest.mark.parametrize("cut", [3, 4, -1])
def test_a_truncated_message_is_reported(rig, cut):
    frame = encode(Poll())
    broken = rig.viewer("broken")
    broken.stream.sendall(frame[:cut])
    broken.stream.close()
    length = len(frame[:cut])
    wait_for(lambda: any(f"{length} bytes into a message" in text for text in rig.dropped()))
    whole = rig.viewer("whole")
    whole.stream.sendall(frame)
    whole.stream.close()
    wait_for(lambda: rig.recorder.status.viewers == ())
    assert len(rig.dropped()) == 1


def test_messages_too_large_to_send_are_reported(rig, monkeypatch):
    def limited(message):
        return encode(message, 20_000)

    monkeypatch.setattr(connections, "encode", limited)
    rig.recorder.notice("mark", "before it grew")
    sample = TextSample(0, 1, "prompt", "x" * 30_000)
    rig.recorder.artifact(sample)
    with rig.viewer("me") as viewer:
        first = viewer.ask(Poll())
        assert (first.artifacts, first.info.name) == ((), "r")
        names = tuple(f"blocks.{i}.attention.weight" for i in range(1_000))
        rig.recorder.describe(
            parameters=tuple(ParameterInfo(name, (4, 4), "float32", 16) for name in names)
        )
        for _ in range(3):
            update = viewer.ask(Poll())
            assert (update.info, update.rows, update.more) == (None, (), False)
    texts = [e.text for e in update.events if e.kind == "viewer"]
    assert [text.split(":")[0] for text in texts] == ["too large to send to me"] * 2
    assert "samples" in texts[0]
    assert "description of the run" in texts[1]
    assert any(e.kind == "mark" for e in update.events)


def test_a_flood_of_faults_is_reported_in_few_lines(rig, monkeypatch):
    from tui_trainer.run import server

    for _ in range(50):
        send(rig, b"\xff" * 8)
    assert len(rig.dropped()) == 20
    monkeypatch.setattr(server, "REPORTED_DROPS_PERIOD_S", 0.0)
    send(rig, b"\xff" * 8)
    assert len(rig.dropped()) == 21
    assert "(and 30 before it)" in rig.dropped()[-1]


def test_peers_are_independent(rig):
    """A peer that sends nonsense, one that reads nothing, a read-only one, and one in control."""
    with rig.viewer("holder") as holder, rig.viewer("watcher", read_only=True) as watcher:
        send(rig, HELLO + b"\x00\x00\x00\x05nonsense")
        assert holder.do(Step(1)).ok
        update = watcher.ask(Poll())
        assert update.status.viewers == ("holder", "watcher")
        commands = [e for e in update.events if e.kind == "command"]
        assert [(e.text, e.who) for e in commands] == [("one step", "holder")]
        assert commands[0].time == pytest.approx(time.time(), abs=600)
