"""A session over a real ssh: connections that are cut or frozen are replaced without a gap."""

from __future__ import annotations

import contextlib
import signal

import psutil

from tests.runs.starting import until
from tests.ssh.sshd import only_ssh, our_ssh
from tui_trainer.client import connection
from tui_trainer.protocol.actions import Pause, Resume


def steps_held(session):
    """The step numbers of the losses that the session has."""
    table = session.poll().history.table("step")
    if table is None or not table.rows:
        return []
    return [int(step) for step in table.tail(table.rows)[0]]


def grows_by(session, count, what):
    before = session.poll().status.step
    until(lambda: session.poll().status.step >= before + count, what)


def assert_no_gap(session):
    steps = steps_held(session)
    assert steps == list(range(1, steps[-1] + 1))


@contextlib.contextmanager
def losing(session, message=""):
    """At the end of the block wait until the link has been lost with that message since it began.
    By then it may have been made again."""
    since = len(session.links)
    yield

    def was_lost():
        session.poll()
        return any(
            link.state == "lost" and message in link.message for link in session.links[since:]
        )

    until(was_lost, f"the loss is noticed: {message}")


def test_measurements_commands_and_close(host, runs, attach):
    runs.start("gpt-far")
    session = attach("ssh://Box/gpt-far")
    grows_by(session, 20, "steps arrive")
    assert session.poll().info.name == "gpt-far"
    assert session.send(Pause()).result(240).ok
    until(lambda: session.poll().status.state == "paused", "it pauses")
    assert session.send(Resume()).result(240).ok
    grows_by(session, 5, "it continues")
    assert_no_gap(session)
    session.close()
    until(lambda: not our_ssh(), "ssh ends with the session")
    assert runs.processes["gpt-far"].poll() is None


def test_prefix_and_the_only_run(host, runs, attach):
    runs.start("gpt-lonely")
    for address in ("ssh://Box", "ssh://Box/", "ssh://Box/gpt-lon", f"ssh://127.0.0.1:{host.port}"):
        session = attach(address)
        grows_by(session, 1, address)
        session.close()


def test_killing_ssh_leaves_no_gap(host, runs, attach):
    runs.start("gpt-far")
    session = attach("ssh://Box/gpt-far")
    for _ in range(3):
        grows_by(session, 10, "steps arrive")
        victim = only_ssh()
        with losing(session, "trying again"):
            victim.kill()
        until(lambda: session.poll().link.state == "live", "it is back")
    grows_by(session, 10, "steps arrive again")
    assert_no_gap(session)


def test_a_frozen_ssh_is_noticed_and_replaced(host, runs, attach, monkeypatch):
    monkeypatch.setattr(connection, "SILENCE_S", 4.0)
    runs.start("gpt-far")
    session = attach("ssh://Box/gpt-far")
    grows_by(session, 10, "steps arrive")
    frozen = only_ssh()
    with losing(session, "not answered"):
        frozen.send_signal(signal.SIGSTOP)
    until(lambda: session.poll().link.state == "live", "another ssh is there")
    until(lambda: frozen.pid not in {each.pid for each in our_ssh()}, "the frozen one is gone")
    grows_by(session, 10, "steps arrive again")
    assert_no_gap(session)


def test_a_frozen_remote_host_is_noticed(host, runs, attach, monkeypatch):
    monkeypatch.setattr(connection, "SILENCE_S", 4.0)
    runs.start("gpt-far")
    session = attach("ssh://Box/gpt-far")
    grows_by(session, 10, "steps arrive")
    frozen = psutil.Process(host.process.pid).children(recursive=True)
    with losing(session):
        for process in frozen:
            with contextlib.suppress(psutil.Error):
                process.suspend()
    until(lambda: session.poll().link.state == "live", "a new connection works")
    grows_by(session, 10, "steps arrive again")
    assert_no_gap(session)
    for process in frozen:
        with contextlib.suppress(psutil.Error):
            process.resume()


def test_a_host_that_goes_and_comes_back(host, runs, attach):
    runs.start("gpt-far")
    session = attach("ssh://Box/gpt-far")
    grows_by(session, 10, "steps arrive")
    host.stop()
    until(lambda: "Connection refused" in session.poll().link.message, "ssh's reason is shown")
    assert session.poll().link.state == "lost"
    assert session.poll().status.step > 0
    assert session.send(Pause()).result(240).ok is False
    host.start()
    until(lambda: session.poll().link.state == "live", "it is back")
    grows_by(session, 10, "steps arrive again")
    assert_no_gap(session)


def test_the_end_of_a_run_is_seen(host, runs, attach):
    runs.start("gpt-short", steps=60, start_paused=True)
    session = attach("ssh://Box/gpt-short")
    assert session.send(Resume()).result(240).ok
    until(lambda: session.poll().status.state == "finished", "the end arrives")
    assert session.poll().status.step == 60
    assert_no_gap(session)


def test_a_run_that_is_killed(host, runs, attach):
    runs.start("gpt-doomed")
    session = attach("ssh://Box/gpt-doomed")
    grows_by(session, 5, "steps arrive")
    runs.kill("gpt-doomed")
    until(lambda: session.poll().link.state == "closed", "it is known to be gone")
    assert "gpt-doomed has crashed" in session.poll().link.message
    assert session.poll().status.state == "crashed"


def test_a_key_that_is_refused_later_is_not_retried_at_once(host, runs, attach):
    runs.start("gpt-far")
    session = attach("ssh://Box/gpt-far")
    grows_by(session, 5, "steps arrive")
    (host.directory / "authorized").write_text("")
    only_ssh().kill()
    until(lambda: "refused" in session.poll().link.message, "it leaves the host alone")
    assert session.poll().link.state == "lost"
    log = (host.directory / "sshd.log").read_text()
    assert log.count("Connection closed by authenticating user") <= 2


def test_a_run_continues_while_its_viewer_is_frozen(host, runs, attach):
    runs.start("gpt-free")
    session = attach("ssh://Box/gpt-free")
    grows_by(session, 5, "steps arrive")
    frozen = only_ssh()
    frozen.suspend()
    session.close()
    before = runs.reported("gpt-free").step
    until(lambda: runs.reported("gpt-free").step > before + 100, "training continues")
    until(lambda: not our_ssh(), "even a stopped ssh is ended")
