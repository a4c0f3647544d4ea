"""A real sshd on loopback with keys of its own, and the ssh command that connects to it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.ports import ReservedPort
from tests.runs.starting import until

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin:/usr/local/sbin")
MISSING = next(
    (
        f"{name} is not installed"
        for name, found in (
            ("sshd", SSHD),
            ("ssh", shutil.which("ssh")),
            ("ssh-keygen", shutil.which("ssh-keygen")),
        )
        if not found
    ),
    "",
)


class Sshd:
    """Listens on 127.0.0.1. Logins have `home` as their home and get `environment`."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        directory.mkdir(parents=True, mode=0o700)
        self.directory = directory
        self.home = directory / "home"
        self.home.mkdir()
        self.environment = environment
        for name in ("host", "user", "stranger"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)],
                check=True,
            )
        (directory / "authorized").write_text((directory / "user.pub").read_text())
        (directory / "authorized").chmod(0o600)
        self._reserved = ReservedPort()
        self.port = self._reserved.number
        self._configure()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def _configure(self) -> None:
        # The code under test, where it is not the installed one.
        path = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        environment = {"HOME": str(self.home), **path, **self.environment}
        settings = " ".join(f'"{name}={value}"' for name, value in environment.items())
        (self.directory / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {self.directory}/host\n"
            f"AuthorizedKeysFile {self.directory}/authorized\nPidFile none\nUsePAM no\n"
            "StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"PermitRootLogin yes\nPrintMotd no\nSetEnv {settings}\n"
        )
        host = (self.directory / "host.pub").read_text().split()[:2]
        (self.directory / "known").write_text(f"[127.0.0.1]:{self.port} {' '.join(host)}\n")
        (self.directory / "ssh_config").write_text(
            f"Host *\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {self.directory}/user\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.directory}/known\n  GlobalKnownHostsFile none\n"
            "Host Box\n  HostName 127.0.0.1\n"
        )

    @property
    def command(self) -> str:
        """For $TUI_TRAINER_SSH: ssh with a configuration in which this host is called `Box`."""
        return f"ssh -F {self.directory}/ssh_config"

    def start(self) -> None:
        """Start listening, and wait until a connection is accepted."""
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        assert SSHD
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(self.directory / "sshd_config")],
            stdin=subprocess.DEVNULL,
            stderr=open(self.directory / "sshd.log", "ab"),  # noqa: SIM115
        )
        deadline = time.monotonic() + 240
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 1),
            ):
                return
            log = (self.directory / "sshd.log").read_text()
            assert self.process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self.process is None:
            return
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        self.process.kill()
        self.process.wait()
        self.process = None

    @contextlib.contextmanager
    def unresponsive(self) -> Iterator[None]:
        """Within the block answer no new connection; those that there are go on."""
        assert self.process is not None
        listening = psutil.Process(self.process.pid)
        listening.suspend()
        try:
            yield
        finally:
            listening.resume()

    def close(self) -> None:
        """Stop, and give the port back."""
        self.stop()
        self._reserved.release()

    def login_shell(self, text: str) -> None:
        """Set what the login shell runs first: bash reads .bashrc when sshd starts it."""
        (self.home / ".bashrc").write_text(text)


def our_ssh() -> list[psutil.Process]:
    """The live ssh processes among our children."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name() == "ssh" and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def only_ssh() -> psutil.Process:
    """Wait until there is exactly one ssh, and return it."""
    return until(lambda: our_ssh() if len(our_ssh()) == 1 else None, "one ssh")[0]


PATH_WITH_US = f"{Path(sys.executable).parent}:/usr/bin:/bin"
