from __future__ import annotations

import os
import signal
import socket
import sys

import pytest

from tests.client.scripted import until
from tui_trainer.client.connection import connector
from tui_trainer.client.live import LiveSession
from tui_trainer.config.run_spec import RunSpec, create_run_directory, new_socket_path
from tui_trainer.runs import launch as launching
from tui_trainer.runs.boot_log import BOOT_LOG
from tui_trainer.runs.errors import NotListening, RunError, RunGone
from tui_trainer.runs.launch import launch
from tui_trainer.runs.registry import connect_run
from tui_trainer.runs.security import connect_unix


@pytest.fixture
def spec(tmp_path):
    name, directory = create_run_directory("gpt", tmp_path)
    return RunSpec(name=name, directory=str(directory), task="gpt", working_directory=str(tmp_path))


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Lets a shell script stand in for the interpreter that would run the training."""

    def use(script: str) -> None:
        path = tmp_path / "interpreter"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(launching.sys, "executable", str(path))

    return use


def test_a_process_that_dies_before_it_listens_is_explained(spec, stand_in):
    stand_in('echo "ImportError: no module named torch" >&2; exit 3')
    launched = launch(spec)
    launched.process.wait(240)
    with pytest.raises(RunGone, match="the run process died: exit status 3") as fault:
        launched.connect()
    assert fault.value.hint == "ImportError: no module named torch"
    assert fault.value.state == "crashed"
    session = LiveSession(connector(launched.connect))
    until(lambda: session.poll().link.state == "closed")
    assert session.poll().status.state == "crashed"
    assert "no module named torch" in session.poll().status.hint


def test_a_signal_is_named(spec, stand_in):
    stand_in("kill -KILL $$")
    launched = launch(spec)
    launched.process.wait(240)
    with pytest.raises(RunGone, match="killed by SIGKILL"):
        launched.connect()


def test_the_process_is_waited_for_and_has_its_own_session(spec, stand_in):
    stand_in('echo "$@" "$(pwd)"; exec sleep 600')
    launched = launch(spec)
    try:
        with pytest.raises(NotListening, match="starting the run process"):
            launched.connect()
        until(lambda: launched.last_output() != "")
        assert launched.last_output() == (
            f"-P -m tui_trainer.run {spec.directory} {spec.working_directory}"
        )
        assert os.getsid(launched.process.pid) == launched.process.pid
        assert (os.stat(os.path.join(spec.directory, BOOT_LOG)).st_mode & 0o777) == 0o600
        if sys.platform == "linux":
            assert os.readlink(f"/proc/{launched.process.pid}/fd/0") == "/dev/null"
        path = new_socket_path(spec.directory)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            os.chmod(path, 0o600)
            with pytest.raises(NotListening):
                launched.connect()  # bound, but not listening yet
            listening.listen()
            launched.connect().close()
    finally:
        launched.process.send_signal(signal.SIGTERM)
        launched.process.wait(240)


def test_a_directory_without_a_run(tmp_path):
    os.chmod(tmp_path, 0o700)
    with pytest.raises(RunGone, match="there is no run in"):
        connect_run(tmp_path)
    with pytest.raises(RunGone, match="there is no run in"):
        connect_run(tmp_path / "nothing")


def test_only_our_own_sockets_are_trusted(tmp_path):
    os.chmod(tmp_path, 0o700)
    plain = tmp_path / "plain"
    plain.touch()
    with pytest.raises(RunError, match="is not a socket"):
        connect_unix(plain)
    path = tmp_path / "open.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        os.chmod(path, 0o666)
        with pytest.raises(RunError, match="others can write"):
            connect_unix(path)
        os.chmod(path, 0o600)
        connect_unix(path).close()
    with pytest.raises(NotListening):
        connect_unix(path)
