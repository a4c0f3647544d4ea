from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
import time

import numpy as np
import pytest

from tests.client.scripted import ScriptedRun, answer_one, greet, serve, serve_for, until
from tui_trainer.client import connection, live
from tui_trainer.client.connection import connector
from tui_trainer.client.live import LiveSession
from tui_trainer.protocol.actions import Mark, Pause, Resume
from tui_trainer.protocol.framing import encode, read_to_run
from tui_trainer.protocol.inspection import ListTensors
from tui_trainer.protocol.messages import Ack, Command, Hello, Poll, Refused, Rows, Status, Update
from tui_trainer.runs.errors import NotListening, RunGone


@pytest.fixture
def start(tmp_path):
    """Start a scripted run and a session with it; both are closed at the end."""
    open_things = []

    def begin(*behaviours):
        run = ScriptedRun(tmp_path / "run.sock", *behaviours)
        session = LiveSession(run.connector)
        session.set_rate(200)
        open_things.extend([session, run])
        return run, session

    yield begin
    for thing in open_things:
        thing.close()


def until_has(session, run):
    """Wait until the newest row, line and event have arrived."""

    def has_all():
        seen = session.poll()
        newest = [
            len(seen.log) and seen.log[-1].id + 1,
            len(seen.events) and seen.events[-1].id + 1,
        ]
        whole = [len(run.log), len(run.events)]
        return newest == whole and seen.history.cursors() == run.history.cursors()

    until(has_all)


def check_same(session, run):
    """Every row arrived exactly once, with its extremes, and every event and line."""
    seen = session.poll()
    assert seen.history.cursors() == run.history.cursors()
    steps = run.status.step
    window = seen.history.tables[0].window([0], 1, steps + 1, 1)
    assert window.high[0, 0] == (np.float32(1e6) if steps >= 100 else 1)
    assert [line.id for line in seen.log] == list(range(len(run.log)))[-5000:]
    assert [event.id for event in seen.events] == list(range(len(run.events)))[-2000:]


def test_follows_a_run_to_its_end(start):
    run, session = start()
    until(lambda: session.poll().link.state == "live")
    assert session.poll().link.viewer_id == 1
    for _ in range(5):
        run.steps(150)
        until_has(session, run)
    check_same(session, run)
    run.steps(3)
    run.end()
    until(lambda: session.poll().link.state == "closed")
    check_same(session, run)
    assert session.poll().status.state == "finished"
    assert session.poll().info == run.info
    assert session.poll().link.bytes_received > 1000


def test_the_version_does_not_grow_while_nothing_changes(start):
    run, session = start()
    run.steps(10)
    until_has(session, run)
    asked = len(run.polls)
    before = session.poll()
    until(lambda: bool(session.poll()) and len(run.polls) > asked + 5)
    assert session.poll().version == before.version
    run.steps(1)
    until(lambda: session.poll().version > before.version)


def test_commands_are_acknowledged_and_shown_at_once(start):
    run, session = start()
    until(lambda: session.poll().link.state == "live")
    session.set_rate(0.1)
    until_quiet(run)
    run.status = Status(state="paused", step=4)
    ack = session.send(Pause()).result(240)
    assert ack.ok
    assert session.poll().status.state == "paused"
    assert [command.action for command in run.commands] == [Pause()]


def until_quiet(run):
    count = -1
    while count != len(run.polls):
        count = len(run.polls)
        time.sleep(0.1)


def test_a_command_does_not_wait_for_the_answer_to_a_poll(start):
    answered = threading.Event()

    def slow(run, connection):
        greet(run, connection)
        poll = read_to_run(connection.recv)
        frame = encode(run.update_for(poll))
        connection.sendall(frame[: len(frame) // 2])
        command = read_to_run(connection.recv)
        assert isinstance(command, Command)
        connection.sendall(frame[len(frame) // 2 :])
        connection.sendall(encode(Ack(command.id, True, run.status)))
        answered.set()
        while True:
            answer_one(run, connection)

    run, session = start(slow)
    run.steps(500)
    until(lambda: session.poll().link.state == "live" and run.polls != [])
    assert session.send(Resume()).result(240).ok
    assert answered.wait(240)


def test_reconnects_without_a_gap(start, monkeypatch):
    monkeypatch.setattr(live, "FIRST_BACK_OFF_S", 0.01)
    run, session = start(*[serve_for(n) for n in (0, 1, 3, 2, 7)])
    for _ in range(60):
        run.steps(20)
        session.poll()
        time.sleep(0.005)
    until(lambda: len(run.hellos) >= 6)
    until_has(session, run)
    check_same(session, run)
    assert session.poll().link.state == "live"


def test_commands_are_refused_while_the_connection_is_lost(start, monkeypatch):
    monkeypatch.setattr(live, "FIRST_BACK_OFF_S", 1000.0)
    run, session = start(serve_for(2))
    until(lambda: session.poll().link.state == "lost")
    assert "trying again in" in session.poll().link.message
    ack = session.send(Pause()).result(240)
    assert not ack.ok
    assert "no connection" in ack.message
    assert session.poll().status == run.status


def test_a_command_is_not_kept_until_a_lost_connection_is_made_again(start, monkeypatch):
    monkeypatch.setattr(live, "FIRST_BACK_OFF_S", 0.01)
    entered, go_on = threading.Event(), threading.Event()

    def slow(run, connection):
        entered.set()
        go_on.wait(240)
        serve(run, connection)

    run, session = start(serve_for(2), slow)
    until(lambda: bool(session.poll()) and entered.is_set())
    answer = session.send(Pause())
    go_on.set()
    assert not answer.result(240).ok
    until(lambda: session.poll().link.state == "live")
    assert run.commands == []


def test_an_unanswered_command_is_refused_when_the_connection_is_lost(start):
    def swallow(run, connection):
        greet(run, connection)
        while not isinstance(read_to_run(connection.recv), Command):
            pass

    _, session = start(swallow)
    until(lambda: session.poll().link.state == "live")
    ack = session.send(Mark("here")).result(240)
    assert not ack.ok
    assert "lost before the answer" in ack.message


def silent(run, connection):
    connection.recv(1000)
    time.sleep(30)


def stuck_after_greeting(run, connection):
    greet(run, connection)
    time.sleep(30)


def half_a_frame(run, connection):
    greet(run, connection)
    frame = encode(run.update_for(read_to_run(connection.recv)))
    connection.sendall(frame[: len(frame) // 2])


def stuck_inside_a_frame(run, connection):
    half_a_frame(run, connection)
    time.sleep(30)


def huge_length(run, connection):
    greet(run, connection)
    connection.sendall(struct.pack(">I", 1 << 31) + b"x" * 100)
    time.sleep(30)


def noise(run, connection):
    greet(run, connection)
    connection.sendall(struct.pack(">I", 50) + bytes(range(50)))
    time.sleep(30)


def unasked(run, connection):
    greet(run, connection)
    connection.sendall(encode(Ack(77, True, run.status)))
    time.sleep(30)


def rows_that_do_not_fit(run, connection):
    greet(run, connection)
    poll = read_to_run(connection.recv)
    assert isinstance(poll, Poll)
    update = run.update_for(poll)
    gap = Rows(0, 7, 1, struct.pack("<q", 7), struct.pack("<ff", 1, 2))
    connection.sendall(encode(Update(update.status, update.info, (*update.rows, gap))))
    while True:
        answer_one(run, connection)


@pytest.mark.parametrize(
    "behaviour",
    [
        silent,
        stuck_after_greeting,
        half_a_frame,
        stuck_inside_a_frame,
        huge_length,
        noise,
        unasked,
        rows_that_do_not_fit,
    ],
)
def test_a_faulty_run_is_disconnected_and_connected_again(start, monkeypatch, behaviour):
    monkeypatch.setattr(connection, "SILENCE_S", 0.3)
    monkeypatch.setattr(live, "FIRST_BACK_OFF_S", 0.02)
    run, session = start(behaviour)
    run.steps(3)
    until(lambda: session.poll() and len(run.hellos) >= (1 if behaviour is silent else 2))
    until_has(session, run)
    check_same(session, run)


def test_a_refusal_is_final(start):
    def refuse(run, connection):
        hello = read_to_run(connection.recv)
        assert isinstance(hello, Hello)
        connection.sendall(encode(Refused("the run speaks protocol 9", "update")))

    _, session = start(refuse)
    until(lambda: session.poll().link.state == "closed")
    assert session.poll().link.message == "the run speaks protocol 9"
    assert session.poll().link.hint == "update"
    assert not session.send(Pause()).result(240).ok


def test_another_run_at_the_same_socket_is_refused(start, monkeypatch):
    monkeypatch.setattr(live, "FIRST_BACK_OFF_S", 0.02)

    def other(run, connection):
        run.info = run.info.__class__("loud-heron", "gpt", revision=1, tables=run.info.tables)
        serve(run, connection)

    _, session = start(serve_for(2), other)
    until(lambda: session.poll().link.state == "closed")
    assert "loud-heron" in session.poll().link.message


def test_the_run_is_not_polled_while_the_app_does_not_take_updates(start):
    run, session = start()
    arrivals = []
    session.on_arrival(lambda: arrivals.append(1))
    for _ in range(30):
        run.steps(20)
        time.sleep(0.01)
    until_quiet(run)
    assert len(run.polls) <= 6
    assert len(arrivals) <= 12
    until_has(session, run)
    check_same(session, run)


def test_watched_topics_are_polled_at_once(start):
    run, session = start()
    session.set_rate(0.1)
    until(lambda: len(run.polls) > 0 and session.poll().link.state == "live")
    until_quiet(run)
    session.watch(frozenset({"attention_heads"}))
    until(lambda: run.polls[-1].watch == ("attention_heads",))


def test_waits_for_a_run_that_starts_and_shows_when_it_died():
    attempts = []

    def connect():
        attempts.append(1)
        if len(attempts) < 4:
            raise NotListening("starting the run process")
        raise RunGone("the run process died: exit status 1", "ImportError: …", "crashed")

    session = LiveSession(connector(connect))
    until(lambda: session.poll().link.state == "closed")
    seen = session.poll()
    assert len(attempts) == 4
    assert (seen.status.state, seen.status.hint) == ("crashed", "ImportError: …")


def test_closing_ends_the_thread_and_the_connection(start):
    _, session = start()
    until(lambda: session.poll().link.state == "live")
    thread = session._thread
    session.close()
    session.close()
    thread.join(240)
    assert not thread.is_alive()
    assert not session.send(Pause()).result(240).ok
    session.set_rate(3)


def test_a_slow_link_makes_updates_smaller(start, monkeypatch):
    monkeypatch.setattr(live, "SLOW_UPDATE_S", 0.02)

    def slow(run, connection):
        greet(run, connection)
        while True:
            message = read_to_run(connection.recv)
            assert isinstance(message, Poll)
            time.sleep(0.03)
            connection.sendall(encode(run.update_for(message)))

    run, session = start(slow)
    run.steps(2000)
    until(lambda: session.poll() and run.polls and run.polls[-1].budget < 10_000)
    until_has(session, run)
    check_same(session, run)


def test_silence_is_shown_while_the_connection_is_kept(start, monkeypatch):
    monkeypatch.setattr(live, "SHOW_SILENCE_S", 0.1)

    seen = threading.Event()

    def quiet(run, connection):
        greet(run, connection)
        answer_one(run, connection)
        seen.wait(240)

    _, session = start(quiet)
    until(lambda: "no answer for" in session.poll().link.message)
    assert session.poll().link.state == "live"
    seen.set()


def test_closing_interrupts_an_attempt_to_connect():
    """An ssh that waits for its network must not keep the session's thread."""
    entered, left = threading.Event(), threading.Event()

    @contextlib.asynccontextmanager
    async def connect():
        entered.set()
        try:
            await asyncio.sleep(600)
            yield
        finally:
            left.set()

    session = LiveSession(connect)
    assert entered.wait(240)
    refused = session.send(Pause())
    session.close()
    assert left.wait(240)
    assert not refused.result(240).ok


def test_every_inspection_is_answered_or_cancelled(start):
    """Also one that the next request replaces before it was sent."""
    _, session = start()
    until(lambda: session.poll().link.state == "live")
    answers = [session.inspect(ListTensors()) for _ in range(50)]
    until(lambda: all(answer.done() for answer in answers[:-1]))
    session.close()
    until(answers[-1].done)


def test_inspections_of_one_moment_reach_the_session_as_the_latest():
    """Those before it are cancelled, and one that the app cancels by itself is no failure."""

    def connect():
        raise NotListening("starting the run process")

    failures = []
    go_on = threading.Event()
    session = LiveSession(connector(connect))
    session._loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
    session._loop.call_soon_threadsafe(go_on.wait)
    unwanted = session.inspect(ListTensors())
    assert unwanted.cancel()
    answers = [session.inspect(ListTensors()) for _ in range(3)]
    last = session.inspect(ListTensors())
    go_on.set()
    assert last.result(240).message == live.NOT_CONNECTED
    assert all(answer.cancelled() for answer in answers)

    go_on.clear()
    session._loop.call_soon_threadsafe(go_on.wait)
    assert session.inspect(ListTensors()).cancel()
    taken = threading.Event()
    session._loop.call_soon_threadsafe(taken.set)
    go_on.set()
    assert taken.wait(240)
    assert session.inspect(ListTensors()).result(240).message == live.NOT_CONNECTED
    session.close()
    session._thread.join(240)
    assert session.inspect(ListTensors()).result(240).message == live.NOT_CONNECTED
    assert not failures
