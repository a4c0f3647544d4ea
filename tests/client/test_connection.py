"""One connection, as the command line uses it."""

from __future__ import annotations

import socket
import threading

import pytest

from tests.client.scripted import ScriptedRun, answer_one, greet, until
from tui_trainer import __version__
from tui_trainer.client import connection
from tui_trainer.client.connection import ConnectionLost, RunClient, next_poll, whoami
from tui_trainer.client.live import LiveSession
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.actions import Mark, Pause, TakeControl
from tui_trainer.protocol.events import LogLine, Notice
from tui_trainer.protocol.framing import encode, read_to_run
from tui_trainer.protocol.messages import (
    Ack,
    Command,
    PhaseReport,
    Poll,
    Refused,
    Rows,
    Status,
    Update,
    Welcome,
)
from tui_trainer.runs.errors import RunGone
from tui_trainer.runs.security import connect_unix

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[5n\x9b31m"


@pytest.fixture
def scripted(tmp_path):
    tmp_path.chmod(0o700)
    runs = []

    def begin(*behaviours):
        runs.append(ScriptedRun(tmp_path / "run.sock", *behaviours))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def client_of(run, **options):
    return RunClient(connect_unix(run.path), **options)


def test_polls_add_up_and_commands_are_answered(scripted):
    run = scripted()
    run.steps(150)
    with client_of(run, viewer="me@here (test)") as client:
        assert client.viewer_id == 1
        while client.poll(budget=2000).more:
            pass
        run.steps(30)
        assert client.poll().status.step == 180
        seen = client.snapshot
        assert seen.history.cursors() == run.history.cursors()
        assert [line.id for line in seen.log] == list(range(180))
        assert [event.id for event in seen.events] == list(range(180))
        assert seen.info == run.info
        assert client.command(Mark("here")).ok
    assert [command.action for command in run.commands] == [Mark("here")]
    assert run.hellos[0].viewer == "me@here (test)"
    assert run.hellos[0].read_only


def test_control_is_taken_from_another_viewer(scripted):
    def held(run, connection):
        greet(run, connection)
        holder = 7
        while True:
            message = read_to_run(connection.recv)
            run.commands.append(message)
            if isinstance(message.action, TakeControl):
                holder = 1
            ok = holder == 1
            connection.sendall(encode(Ack(message.id, ok, Status(controller=holder))))

    run = scripted(held)
    with client_of(run, read_only=False) as client:
        assert client.command_in_control(Pause()).ok
    assert [command.action for command in run.commands] == [Pause(), TakeControl(), Pause()]


def test_control_characters_of_a_run_cannot_reach_the_terminal(scripted):
    """Neither a screen nor a command shows a control character that a run sent."""

    def hostile(run, connection):
        run.hellos.append(read_to_run(connection.recv))
        connection.sendall(encode(Welcome(PROTOCOL_VERSION, ESCAPES, run.info.name, 1)))
        while True:
            message = read_to_run(connection.recv)
            status = Status(reason=ESCAPES, viewers=(ESCAPES,))
            if isinstance(message, Command):
                connection.sendall(encode(Ack(message.id, False, status, ESCAPES, ESCAPES)))
                continue
            update = Update(
                status,
                events=(Notice(0, 1, 0.0, "mark", ESCAPES, who=ESCAPES),),
                log=(LogLine(0, 0.0, 1, "stdout", ESCAPES),),
            )
            connection.sendall(encode(update))

    run = scripted(hostile, hostile)
    with client_of(run) as client:
        client.poll()
        refused = client.command(Pause())
    session = LiveSession(run.connector)
    until(lambda: session.poll().log != ())
    acks = [refused, session.send(Pause()).result(240)]
    for seen, ack in zip((client.snapshot, session.poll()), acks, strict=True):
        texts = [seen.status.reason, seen.status.viewers[0], seen.events[0].text]
        texts += [seen.events[0].who, seen.log[0].text, ack.message, ack.hint, ack.status.reason]
        for text in texts:
            assert "\x1b" not in text
            assert "\x9b" not in text
            assert "owned" in text
    session.close()


def test_a_refusal_is_read_although_the_run_has_closed_its_end():
    """The greeting can no longer be sent, which must not hide the reason."""
    for _ in range(20):
        ours, theirs = socket.socketpair()
        theirs.sendall(encode(Refused("64 viewers look at this run", "close one")))
        theirs.close()
        with pytest.raises(RunGone, match="64 viewers look at this run") as refused:
            RunClient(ours)
        assert refused.value.hint == "close one"
        assert ours.fileno() == -1


def test_another_protocol_is_named(scripted):
    def older(run, connection):
        read_to_run(connection.recv)
        connection.sendall(encode(Welcome(1, "0.0.9", "r", 1)))

    with pytest.raises(RunGone) as refused:
        client_of(scripted(older))
    assert "the run speaks protocol 1 (tui-trainer 0.0.9)" in refused.value.message
    assert f"this is {PROTOCOL_VERSION} ({__version__})" in refused.value.message


def test_a_run_that_stops_answering_is_an_error(scripted, monkeypatch):
    answered = threading.Event()

    def silent(run, connection):
        greet(run, connection)
        answer_one(run, connection)
        answered.wait(240)

    client = client_of(scripted(silent))
    client.poll()
    monkeypatch.setattr(connection, "SILENCE_S", 0.2)
    client._connection._silence_timer.cancel()  # set before, by what was answered
    client._connection._silence_timer = None
    with pytest.raises(ConnectionLost, match="has not answered"):
        client.poll()
    with pytest.raises(ConnectionLost):
        client.command(Pause())
    client.close()
    answered.set()


def test_the_next_poll_asks_for_the_following_rows():
    first = Poll(budget=1000, watch=("attention_heads",))
    report = PhaseReport(3, "backward", 1.0, "")
    update = Update(
        Status(state="paused"),
        rows=(Rows(2, 10, 5, b"", b""), Rows(0, 0, 7, b"", b""), Rows(1 << 40, 0, 1, b"", b"")),
        events=(Notice(4, 1, 0.0, "mark", ""),),
        log=(LogLine(8, 0.0, 1, "stdout", ""),),
        report=report,
    )
    second = next_poll(first, update)
    assert second == Poll(
        rows=(7, 0, 15), event=5, log=9, report=(3, "backward"), watch=first.watch, budget=1000
    )
    assert next_poll(second, Update(Status(state="paused"))) == second
    assert next_poll(second, Update(Status(state="running"))).report is None


def test_a_viewer_identifies_itself():
    assert whoami("tui-trainer pause").endswith(" (tui-trainer pause)")
    assert "@" in whoami()
