from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.conftest import runs
from tests.ssh.sshd import MISSING, PATH_WITH_US, Sshd
from tui_trainer.client import ssh
from tui_trainer.client.live import LiveSession
from tui_trainer.client.ssh import SshConnector, parse_address

__all__ = ["runs"]

# Not tmp_path: as root, that is under a directory that only its maker may enter, which is fine for
# sshd too; but its long names would leave no room for a socket's.


def pytest_collection_modifyitems(items):
    if MISSING:
        for item in items:
            if Path(__file__).parent in Path(item.fspath).parents:
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(autouse=True)
def wait_for_the_words_of_ssh(monkeypatch):
    """However long a busy machine takes to hand them on."""
    monkeypatch.setattr(ssh, "_STDERR_WITHIN_S", 240.0)
    monkeypatch.setattr(ssh, "_EXIT_WITHIN_S", 240.0)


@pytest.fixture
def host(tmp_path, runs, monkeypatch):
    """A machine that ssh reaches as `Box`, where tui-trainer is on the path."""
    environment = {"PATH": PATH_WITH_US, "TUI_TRAINER_RUNS_DIR": str(runs.directory)}
    sshd = Sshd(tmp_path / "sshd", environment)
    monkeypatch.setenv("TUI_TRAINER_SSH", sshd.command)
    runs.environment["TUI_TRAINER_SSH"] = sshd.command
    yield sshd
    sshd.close()


@pytest.fixture
def bare_host(tmp_path, monkeypatch):
    """A machine without tui-trainer."""
    empty = tmp_path / "bin"
    empty.mkdir()
    for name in ("sh", "bash", "echo"):
        (empty / name).symlink_to(f"/bin/{name}")
    sshd = Sshd(tmp_path / "bare", {"PATH": str(empty)})
    monkeypatch.setenv("TUI_TRAINER_SSH", sshd.command)
    yield sshd
    sshd.close()


@pytest.fixture
def attach():
    """Open a session to an address, as the command does, without a screen."""
    sessions = []

    def begin(address: str, **options):
        connect = SshConnector(parse_address(address), **options)
        connect.begin(lambda offered: offered[0].name)
        session = LiveSession(connect)
        session.links = links = []  # all that there were: one may be gone before it is looked at
        session.on_arrival(lambda: links.append(session._link))
        session.set_rate(20)
        sessions.append(session)
        return session

    yield begin
    for session in sessions:
        session.close()
