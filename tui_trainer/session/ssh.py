"""Reaching a run on another machine through the user's own `ssh`.

Everything about the connection (keys, agent, jump hosts, known hosts, aliases) is as the user's ssh
has it. The first connection is made before anything is painted, so that ssh may ask for a password
or about a host key on the terminal; those that follow are made in batch mode, without a terminal.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence

from tui_trainer import __version__
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.session.address import SshAddress
from tui_trainer.session.greeting import NoGreeting, RelayGreeting, RemoteRun
from tui_trainer.session.ssh_process import SshEnded, SshProcess
from tui_trainer.session.stream import RunGone, Stream, Unreachable
from tui_trainer.session.trust import RunError

REMOTE_COMMAND_VARIABLE = "TUI_TRAINER_REMOTE_COMMAND"
SSH_COMMAND_VARIABLE = "TUI_TRAINER_SSH"
RECONNECT_S = 15.0
"""How long one attempt to connect again may take."""
DENIED_PAUSE_S = 60.0
"""Hosts ban whoever knocks again and again after being refused."""
OPTIONS = (
    "-T",
    "-x",
    # A link that is frozen rather than closed is noticed after 15 s.
    *("-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=3"),
    *("-o", "ConnectTimeout=10"),
    # Measurements shrink to a quarter or less, at no cost that could be felt.
    *("-o", "Compression=yes"),
    # As scp does: what the user's config asks for interactive logins would be in the way.
    *("-o", "RemoteCommand=none"),
    *("-o", "RequestTTY=no"),
    *("-o", "PermitLocalCommand=no"),
    *("-o", "ClearAllForwardings=yes"),
)
# Login shells differ (fish, csh), so this is one word for them: no ' nor backslash nor ! in it.
_LOOK_UP = (
    'for c in tui-trainer "$HOME/.local/bin/tui-trainer"; do '
    'if command -v "$c" >/dev/null 2>&1; then exec "$c" relay "$@"; fi; done; '
    "for p in python3 python; do "
    'if "$p" -c "import tui_trainer" >/dev/null 2>&1; then '
    'exec "$p" -m tui_trainer relay "$@"; fi; done; '
    "echo; echo TUI-TRAINER-RELAY missing"
)

Choose = Callable[[Sequence[RemoteRun]], str]
"""Asks which of several runs is meant; returns its name. May raise RunError."""


def remote_command(run: str, command: str = "", runs_dir: str = "") -> str:
    """What the login shell at the far end is told: `command` (or $TUI_TRAINER_REMOTE_COMMAND, or
    tui-trainer wherever it is found there) as relay for `run`."""
    words = [f"--runs-dir={runs_dir}"] if runs_dir else []
    words += [run] if run else []
    arguments = " ".join(shlex.quote(word) for word in words)
    given = command or os.environ.get(REMOTE_COMMAND_VARIABLE, "")
    if given:
        return f"{given} relay {arguments}".rstrip()
    return f"sh -c {shlex.quote(_LOOK_UP)} sh {arguments}".rstrip()


def ssh_command(address: SshAddress, remote: str, batch: bool) -> list[str]:
    """The whole command line."""
    ssh = shlex.split(os.environ.get(SSH_COMMAND_VARIABLE, "")) or ["ssh"]
    port = ["-p", str(address.port)] if address.port else []
    asking = ["-o", "BatchMode=yes"] if batch else []
    return [*ssh, *OPTIONS, *asking, *port, "--", address.destination, remote]


class SshConnector:
    """For `LiveSession`: connects to a run on another machine, again and again if need be."""

    def __init__(self, address: SshAddress, command: str = "", runs_dir: str = "") -> None:
        self.address = address
        self._command = command
        self._runs_dir = runs_dir
        self._ready: SshProcess | None = None
        self._denied_at: float | None = None

    def begin(self, choose: Choose, interactive: bool = True) -> str:
        """Make the first connection, on which ssh may ask on the terminal; returns the run's name.

        Where no run was named and the host has several, `choose` is asked. Raises RunError."""
        process = self._start(batch=not interactive)
        try:
            greeting = self._check(process.greeting())
            if greeting.kind == "choose":
                process.answer(choose(greeting.runs))
                greeting = self._check(process.greeting())
            if greeting.kind != "connected":
                raise RunError(f"{self.address.host} offers no run", "say which: ssh://host/RUN")
        except SshEnded as ended:
            process.close()
            raise self._explain(ended) from ended
        except NoGreeting as fault:
            process.close()
            raise self._not_ours(str(fault)) from fault
        except BaseException:
            process.close()
            raise
        self.address = SshAddress(
            self.address.host, self.address.user, self.address.port, greeting.run
        )
        self._ready = process
        return greeting.run

    def __call__(self) -> Stream:
        """One attempt: the first time what `begin` made. Raises Unreachable and RunGone."""
        process, self._ready = self._ready, None
        if process is not None:
            return process.stream()
        return self._again().stream()

    def _again(self) -> SshProcess:
        if self._denied_at is not None:
            left = self._denied_at + DENIED_PAUSE_S - time.monotonic()
            if left > 0:
                raise Unreachable(f"{self.address.host} refused, leaving it alone for {left:.0f} s")
            self._denied_at = None
        try:
            process = self._start(batch=True)
        except RunError as fault:
            raise RunGone(fault.message, fault.hint) from fault
        try:
            greeting = process.greeting(time.monotonic() + RECONNECT_S)
            if greeting.state:
                raise RunGone(greeting.message, greeting.hint, greeting.state)
            self._check(greeting)
        except SshEnded as ended:
            process.close()
            raise self._why_not_again(ended) from ended
        except (RunError, NoGreeting) as fault:
            process.close()
            raise RunGone(str(fault), getattr(fault, "hint", "")) from fault
        except BaseException:
            process.close()
            raise
        return process

    def _why_not_again(self, ended: SshEnded) -> Unreachable:
        said = ended.said or "ssh gave no reason"
        if "Permission denied" in said or "Host key verification failed" in said:
            self._denied_at = time.monotonic()
            return Unreachable(
                f"{self.address.host} refuses: {said}",
                "ssh cannot ask for a password while the app is on the screen: attach again, or "
                "use a key with an agent",
            )
        if ended.status is None:
            said = f"no answer within {RECONNECT_S:.0f} s"
        return Unreachable(f"ssh: {said}")

    def _start(self, batch: bool) -> SshProcess:
        remote = remote_command(self.address.run, self._command, self._runs_dir)
        command = ssh_command(self.address, remote, batch)
        if shutil.which(command[0]) is None:
            raise RunError(f"there is no {command[0]} on this machine", "install OpenSSH's client")
        try:
            return SshProcess(command, interactive=not batch)
        except OSError as fault:
            raise RunError(f"cannot start {command[0]}: {fault.strerror}") from fault

    def _check(self, greeting: RelayGreeting) -> RelayGreeting:
        host = self.address.host
        if greeting.kind == "missing":
            raise RunError(
                f"{host} has no tui-trainer on the path of a login without a terminal",
                f"install it there, or say where it is with --remote-command or "
                f"${REMOTE_COMMAND_VARIABLE}",
            )
        if greeting.protocol != PROTOCOL_VERSION:
            raise RunError(
                f"{host} has tui-trainer {greeting.product}, which speaks protocol "
                f"{greeting.protocol}; this is {__version__}, which speaks {PROTOCOL_VERSION}",
                "use the same version of tui-trainer on both sides",
            )
        if greeting.kind == "error":
            raise RunError(f"{host}: {greeting.message}", greeting.hint)
        return greeting

    def _explain(self, ended: SshEnded) -> RunError:
        host, said = self.address.host, ended.said
        port = f"-p {self.address.port} " if self.address.port else ""
        if ended.status == 255:
            return RunError(
                f"ssh cannot reach {self.address.destination}: {said or 'it gave no reason'}",
                f"try it alone: ssh {port}{self.address.destination} true",
            )
        if ended.status in (126, 127):
            return RunError(
                f"{host} cannot run the remote command: {said or ended.noise[-200:]}",
                f"--remote-command or ${REMOTE_COMMAND_VARIABLE} says where tui-trainer is there",
            )
        return self._not_ours(said or ended.noise[-200:] or f"it ended with {ended.status}")

    def _not_ours(self, why: str) -> RunError:
        why = "".join(c if c.isprintable() else " " for c in why).strip()
        return RunError(
            f"what answers at {self.address.host} is no relay of tui-trainer: {why}",
            f"is it tui-trainer {__version__} there, and does a login without a terminal end in a "
            "plain shell?",
        )
