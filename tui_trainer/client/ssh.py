"""Reaching a run on another machine through the user's own `ssh`.

Everything about the connection (keys, agent, jump hosts, known hosts, aliases) is as the user's ssh
has it. The first connection is made before anything is painted, so that ssh may ask for a password
or about a host key on the terminal; those that follow are made in batch mode, without a terminal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import msgspec

from tui_trainer import __version__
from tui_trainer.client.connection import RunGone, Stream, Unreachable
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.text import sanitize_message
from tui_trainer.runs.errors import RunError

# ---- greeting
# The one line with which the far end of an ssh connection begins, before the protocol does.
#
# A login shell may print anything first, the host may lack tui-trainer, hold another version or
# not
# have that run: this line, found by its mark, tells them apart.


MARK = b"TUI-TRAINER-RELAY "
MISSING = b"missing"
"""In place of the greeting, from the shell, where the host has no tui-trainer."""
MAX_NOISE_BYTES = 256 * 1024
"""What shells print before it, at most."""


class RemoteRun(msgspec.Struct, frozen=True):
    """A run that the host offers."""

    name: str
    state: str
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    title: str = ""
    started_at: float = 0.0


class RelayGreeting(msgspec.Struct, frozen=True):
    """What the relay found."""

    kind: str
    """`connected`: the protocol follows; `choose`: it waits for a line with one of the names in
    `runs`, and greets again; `error`: `message` says why there is nothing to connect to."""
    protocol: int = PROTOCOL_VERSION
    product: str = __version__
    run: str = ""
    message: str = ""
    hint: str = ""
    state: str = ""
    """Of a run that has ended: `finished`, `stopped` or `crashed`."""
    runs: tuple[RemoteRun, ...] = ()


class NoGreeting(Exception):
    """What follows the mark cannot be read."""


def encode_greeting(greeting: RelayGreeting) -> bytes:
    """On a line of its own, whatever was printed before it."""
    return b"\n" + MARK + msgspec.json.encode(greeting) + b"\n"


def find_greeting(received: bytes) -> RelayGreeting | None:
    """The greeting in what the far end printed; None while it is not there in full.

    Raises NoGreeting when there is too much noise, or the greeting is of an unknown kind.
    """
    start = received.find(MARK)
    if start < 0:
        if len(received) > MAX_NOISE_BYTES:
            raise NoGreeting("it prints without end instead of greeting")
        return None
    line, newline, _ = received[start + len(MARK) :].partition(b"\n")
    if not newline:
        if len(line) > MAX_NOISE_BYTES:
            raise NoGreeting("its greeting has no end")
        return None
    if line.strip() == MISSING:
        return RelayGreeting("missing")
    try:
        return sanitize_message(msgspec.json.decode(line, type=RelayGreeting))
    except msgspec.DecodeError as fault:
        raise NoGreeting(f"its greeting cannot be read: {fault}") from fault


# ---- ssh_process
# One `ssh` process that runs a relay at the far end, and what it said when it ended.


STDERR_LINES_KEPT = 40
SHOW_AFTER_S = 1.0
_CLOSING_S = 0.3


class SshEnded(Exception):
    """ssh ended, or gave nothing in time, before the far end greeted."""

    def __init__(self, status: int | None, said: str, noise: str) -> None:
        super().__init__(said)
        self.status = status
        """Its exit status: 255 when ssh itself failed; None when the time was up."""
        self.said = said
        """The end of its stderr, one line."""
        self.noise = noise
        """What the far end printed instead of a greeting."""


class SshProcess:
    """Runs `command`; its standard streams are the way to the far end.

    An `interactive` one may ask questions on the terminal, and what it says is passed on there; any
    other is cut off from the terminal, so that it cannot disturb what is on the screen.
    """

    def __init__(self, command: Sequence[str], interactive: bool) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=not interactive,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._received = b""
        self._lines: deque[str] = deque(maxlen=STDERR_LINES_KEPT)
        self._interactive = interactive
        self._unshown: deque[str] = deque()
        self._reader = threading.Thread(
            target=self._read_stderr, name="tui-trainer ssh stderr", daemon=True
        )
        self._reader.start()

    def greeting(self, deadline: float | None = None) -> RelayGreeting:
        """Wait for the next greeting, until `deadline` (time.monotonic). Raises SshEnded and
        NoGreeting."""
        self._received = b""
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise self._ended(None)
            patience = SHOW_AFTER_S if left is None else min(left, SHOW_AFTER_S)
            ready, _, _ = select.select([self._stdout], [], [], patience)
            if not ready:
                self._show()
                continue
            part = os.read(self._stdout.fileno(), 1 << 16)
            if not part:
                raise self._ended(self._wait())
            self._received += part
            found = find_greeting(self._received)
            if found is not None:
                return found

    def answer(self, line: str) -> None:
        """Send one line to the relay. Raises SshEnded."""
        try:
            os.write(self._stdin.fileno(), line.encode() + b"\n")
        except OSError:
            raise self._ended(self._wait()) from None

    def stream(self) -> Stream:
        """Its streams from now on; closing the stream ends the process."""
        self._interactive = False
        return _SshStream(self)

    def descriptors(self) -> tuple[int, int]:
        """What to read from and what to write to."""
        return self._stdout.fileno(), self._stdin.fileno()

    def last_words(self, wait: bool = False) -> str:
        """The end of its stderr, one line; "" when it said nothing. `wait`: for a moment, for the
        rest of it."""
        if wait:
            self._reader.join(_CLOSING_S)
        kept = [line for line in self._lines if not line.startswith("Warning: Permanently added")]
        return " · ".join(kept[-3:])

    def close(self) -> None:
        """End it. Returns at once; also ends one that is stopped."""
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process dies on going on
            with contextlib.suppress(OSError):
                self._process.send_signal(number)
        threading.Thread(target=self._reap, name="tui-trainer ssh end", daemon=True).start()

    def _reap(self) -> None:
        try:
            self._process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> int | None:
        try:
            return self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return None

    def _ended(self, status: int | None) -> SshEnded:
        noise = self._received.decode("utf-8", "replace").strip()
        return SshEnded(status, self.last_words(wait=True), noise)

    def _show(self) -> None:
        """Pass on what ssh says while it waits, such as to touch a key; what it says on ending goes
        into our own message."""
        while self._interactive and self._unshown:
            with contextlib.suppress(OSError, ValueError):
                print(self._unshown.popleft(), file=sys.stderr, flush=True)

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                text = "".join(c if c.isprintable() else " " for c in text)[:500]
                self._lines.append(text)
                self._unshown.append(text)


class _SshStream(Stream):
    """Says what ssh said when the link ends."""

    def __init__(self, process: SshProcess) -> None:
        super().__init__(*process.descriptors(), process.close)
        self._ssh = process

    def receive(self, size: int = 1 << 16) -> bytes | None:
        """See `Stream.receive`; at an end that ssh explains, OSError with its words."""
        data = super().receive(size)
        if data == b"" and (said := self._ssh.last_words(wait=True)):
            raise OSError(errno.ECONNRESET, f"ssh: {said}")
        return data


# ---- address
# `ssh://[user@]host[:port][/RUN]`: what of it may reach a command line, and what may not.


SCHEME = "ssh://"
FORM = "the form is ssh://[user@]host[:port][/RUN]"
# ssh hands names to shells (ProxyCommand, Match exec), so nothing passes that a shell would read,
# nor anything that begins with a dash, which would be an option.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,15})?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@-]{0,63}")
_RUN = re.compile(r"\w[\w.+-]{0,199}")


@dataclass(frozen=True)
class SshAddress:
    """A machine that ssh can reach, and perhaps a run there."""

    host: str
    user: str = ""
    port: int | None = None
    run: str = ""
    """Its name or the beginning of it; "" where it was not said."""

    @property
    def destination(self) -> str:
        """As ssh takes it."""
        return f"{self.user}@{self.host}" if self.user else self.host

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        return f"{SCHEME}{user}{host}{port}" + (f"/{self.run}" if self.run else "")


def parse_address(given: str) -> SshAddress:
    """The parts of an `ssh://` address. Raises RunError when it is none."""
    if not given.isprintable() or " " in given:
        raise RunError(f"{given!r} is no address", FORM)
    try:
        parts = urlsplit(given)
        host, port = parts.hostname or "", parts.port
    except ValueError as fault:
        raise RunError(f"{given} is no address: {fault}", FORM) from fault
    # urlsplit folds the host to lower case, but aliases in ~/.ssh/config are case-sensitive.
    exact = parts.netloc.rpartition("@")[2]
    if not exact.startswith("["):
        host = exact.partition(":")[0]
    if parts.scheme != "ssh" or parts.query or parts.fragment:
        raise RunError(f"{given} is no address of a run", FORM)
    if not (_HOST.fullmatch(host) or (":" in host and _ADDRESS.fullmatch(host))):
        raise RunError(f"{host!r} is not the name of a host" if host else "no host is named", FORM)
    if port == 0:
        raise RunError("port 0 cannot be connected to", FORM)
    if parts.password is not None:
        raise RunError(
            "a password cannot be given in the address", "ssh itself asks for it, or use a key"
        )
    user = unquote(parts.username or "")
    if "@" in parts.netloc and not _USER.fullmatch(user):
        raise RunError(f"{user!r} is not the name of a user", FORM)
    return SshAddress(host, user, port, _run_in(unquote(parts.path)))


def _run_in(path: str) -> str:
    run = path.strip("/")
    if run and not _RUN.fullmatch(run):
        raise RunError(f"{run!r} is not the name of a run", FORM)
    return run


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
