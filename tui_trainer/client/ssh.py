"""Reaching a run on another machine through the user's own `ssh`.

The user's ssh configuration decides everything about the connection: keys, agent, jump hosts, known
hosts, aliases. The first connection is made before anything is painted, so that ssh may ask for a
password or about a host key on the terminal; later ones are made in batch mode, without a terminal.
On the other machine ssh runs `tui-trainer relay`, which greets with one line and then copies bytes
to and from the run's socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from tui_trainer import __version__
from tui_trainer.client.connection import PeerClosed
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.formatting import rough_duration
from tui_trainer.protocol.framing import NoGreeting, RelayGreeting, RemoteRun, find_greeting
from tui_trainer.protocol.text import single_line
from tui_trainer.runs.errors import RunError, RunGone, Unreachable

# ---------------------------------------------------------------- the ssh process

STDERR_LINES_KEPT = 40
SHOW_AFTER_S = 1.0
"""Delay before lines printed by ssh are shown, so that an error that ends ssh appears only in our
own message."""
_EXIT_WITHIN_S = 5.0
_STDERR_WITHIN_S = _TERMINATE_WITHIN_S = 0.3


class SshEnded(Exception):
    """ssh ended or timed out before the relay sent its greeting."""

    def __init__(self, exit_status: int | None, stderr: str, noise: str) -> None:
        super().__init__(stderr)
        self.exit_status = exit_status
        """255 when ssh itself failed; None when the time was up."""
        self.stderr = stderr
        """The last lines that ssh printed, joined."""
        self.noise = noise
        """Output received instead of a greeting."""


class SshProcess:
    """An `ssh` whose standard input and output are one end of a socket pair; `socket` is the other.

    An `interactive` ssh may ask questions on the terminal, where its messages are shown. Any other
    has no terminal, so that it cannot disturb the screen.
    """

    def __init__(self, command: Sequence[str], interactive: bool) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.PIPE,
                start_new_session=not interactive,
            )
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()
        self._interactive = interactive
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES_KEPT)
        self._unshown: deque[str] = deque()
        self._reader = threading.Thread(
            target=self._read_stderr, name="tui-trainer ssh stderr", daemon=True
        )
        self._reader.start()

    async def greeting(self, timeout: float | None = None) -> RelayGreeting:
        """Wait for the next greeting. Raises SshEnded and NoGreeting."""
        received = b""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (found := find_greeting(received)) is None:
            try:
                part = await self._receive(deadline)
            except TimeoutError:
                raise await self._ended(None, received) from None
            if not part:
                raise await self._ended(await self._exit_status(), received)
            received += part
        return found

    async def _receive(self, deadline: float | None) -> bytes:
        """Receive the next bytes, or b"" at the end. Meanwhile print ssh's messages, such as the
        request to touch a security key. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        # A receive cancelled as its bytes arrive would lose them: one receive spans all waits.
        receiving = asyncio.ensure_future(loop.sock_recv(self.socket, 1 << 16))
        try:
            while (left := SHOW_AFTER_S if deadline is None else deadline - time.monotonic()) > 0:
                await asyncio.wait({receiving}, timeout=min(left, SHOW_AFTER_S))
                if receiving.done():
                    return receiving.result()
                while self._interactive and self._unshown:
                    with contextlib.suppress(OSError, ValueError):
                        print(self._unshown.popleft(), file=sys.stderr, flush=True)
            raise TimeoutError
        except ConnectionResetError:
            return b""
        finally:
            receiving.cancel()

    async def answer(self, line: str) -> None:
        """Send one line to the relay. Raises SshEnded."""
        try:
            await asyncio.get_running_loop().sock_sendall(self.socket, line.encode() + b"\n")
        except OSError:
            raise await self._ended(await self._exit_status(), b"") from None

    def close(self) -> None:
        """End the process, even a stopped one. Does not wait for it."""
        self.socket.close()
        for number in (signal.SIGTERM, signal.SIGCONT):
            with contextlib.suppress(OSError):
                self._process.send_signal(number)
        threading.Thread(target=self._reap, name="tui-trainer ssh end", daemon=True).start()

    async def last_words(self) -> str:
        """The last lines that ssh printed to its stderr, joined; "" for none."""
        await _wait_until(lambda: not self._reader.is_alive(), _STDERR_WITHIN_S)
        added_host_key = "Warning: Permanently added"
        lines = [line for line in self._stderr if not line.startswith(added_host_key)]
        return " · ".join(lines[-3:])

    async def _ended(self, exit_status: int | None, received: bytes) -> SshEnded:
        noise = received.decode("utf-8", "replace").strip()
        return SshEnded(exit_status, await self.last_words(), noise)

    async def _exit_status(self) -> int | None:
        await _wait_until(lambda: self._process.poll() is not None, _EXIT_WITHIN_S)
        return self._process.poll()

    def _reap(self) -> None:
        try:
            self._process.wait(_TERMINATE_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = single_line(line.decode("utf-8", "replace"), 500)
            if text:
                self._stderr.append(text)
                self._unshown.append(text)


async def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)


# ---------------------------------------------------------------- ssh:// addresses

SCHEME = "ssh://"
FORM = "the form is ssh://[user@]host[:port][/RUN]"
# ssh hands names to shells (ProxyCommand, Match exec), so nothing passes that a shell would
# interpret, nor anything that begins with a dash, which would be an option.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_IP_ADDRESS = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,15})?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@-]{0,63}")
_RUN = re.compile(r"\w[\w.+-]{0,199}")


@dataclass(frozen=True)
class SshAddress:
    """A machine that ssh can reach, and perhaps a run there."""

    host: str
    user: str = ""
    port: int | None = None
    run: str = ""
    """Name of the run, or the beginning of the name; "" for none."""

    @property
    def destination(self) -> str:
        """The destination in the form that ssh takes."""
        return f"{self.user}@{self.host}" if self.user else self.host

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        return f"{SCHEME}{user}{host}{port}" + (f"/{self.run}" if self.run else "")


def parse_address(given: str) -> SshAddress:
    """The parts of an `ssh://` address. Raises RunError when it is not one."""
    if not given.isprintable() or " " in given:
        raise RunError(f"{given!r} is not an address", FORM)
    try:
        parts = urlsplit(given)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise RunError(f"{given} is not an address: {error}", FORM) from error
    # urlsplit folds the host to lower case, but aliases in ~/.ssh/config are case-sensitive.
    exact = parts.netloc.rpartition("@")[2]
    if not exact.startswith("["):
        host = exact.partition(":")[0]
    if parts.scheme != "ssh" or parts.query or parts.fragment:
        raise RunError(f"{given} is not the address of a run", FORM)
    if not host:
        raise RunError("the address names no host", FORM)
    if not (_HOST.fullmatch(host) or (":" in host and _IP_ADDRESS.fullmatch(host))):
        raise RunError(f"{host!r} is not the name of a host", FORM)
    if port == 0:
        raise RunError("port 0 cannot be connected to", FORM)
    if parts.password is not None:
        raise RunError(
            "a password cannot be given in the address", "ssh itself asks for it, or use a key"
        )
    user = unquote(parts.username or "")
    if "@" in parts.netloc and not _USER.fullmatch(user):
        raise RunError(f"{user!r} is not the name of a user", FORM)
    run = unquote(parts.path).strip("/")
    if run and not _RUN.fullmatch(run):
        raise RunError(f"{run!r} is not the name of a run", FORM)
    return SshAddress(host, user, port, run)


# ---------------------------------------------------------------- the command line

REMOTE_COMMAND_VARIABLE = "TUI_TRAINER_REMOTE_COMMAND"
SSH_COMMAND_VARIABLE = "TUI_TRAINER_SSH"
OPTIONS = (
    "-T",
    "-x",
    # A connection that is frozen rather than closed is noticed after 15 s.
    *("-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=3"),
    *("-o", "ConnectTimeout=10"),
    # Measurements shrink to a quarter or less, at no noticeable cost.
    *("-o", "Compression=yes"),
    # As in scp: options in the user's configuration for interactive logins would interfere.
    *("-o", "RemoteCommand=none"),
    *("-o", "RequestTTY=no"),
    *("-o", "PermitLocalCommand=no"),
    *("-o", "ClearAllForwardings=yes"),
)
# Login shells differ (fish, csh), so the script is a single quoted word that contains no ', no
# backslash and no !.
_FIND_AND_RUN = (
    'for c in tui-trainer "$HOME/.local/bin/tui-trainer"; do '
    'if command -v "$c" >/dev/null 2>&1; then exec "$c" relay "$@"; fi; done; '
    "for p in python3 python; do "
    'if "$p" -c "import tui_trainer" >/dev/null 2>&1; then '
    'exec "$p" -m tui_trainer relay "$@"; fi; done; '
    "echo; echo TUI-TRAINER-RELAY missing"
)


def remote_command(run: str, command: str = "", runs_dir: str = "", launch: str = "") -> str:
    """What the login shell on the other machine runs: the relay for `run` or for the run of a
    `launch`, with `command`, with $TUI_TRAINER_REMOTE_COMMAND, or with tui-trainer wherever it is
    found there."""
    words = [f"--runs-dir={runs_dir}"] if runs_dir else []
    words += [f"--launch={launch}"] if launch else []
    words += [run] if run else []
    arguments = " ".join(shlex.quote(word) for word in words)
    given = command or os.environ.get(REMOTE_COMMAND_VARIABLE, "")
    if given:
        return f"{given} relay {arguments}".rstrip()
    return f"sh -c {shlex.quote(_FIND_AND_RUN)} sh {arguments}".rstrip()


def ssh_command(address: SshAddress, remote: str, batch: bool) -> list[str]:
    """The command line that runs `remote` on the other machine."""
    ssh = shlex.split(os.environ.get(SSH_COMMAND_VARIABLE, "")) or ["ssh"]
    port = ["-p", str(address.port)] if address.port else []
    batch_mode = ["-o", "BatchMode=yes"] if batch else []
    return [*ssh, *OPTIONS, *batch_mode, *port, "--", address.destination, remote]


# ---------------------------------------------------------------- connecting

RECONNECT_S = 15.0
"""Timeout of one attempt to reconnect."""
DENIED_PAUSE_S = 60.0
"""Pause after a refused login: hosts ban clients that try again and again."""

Choose = Callable[[Sequence[RemoteRun]], str]
"""Asks the user which of several runs to attach to; returns its name. May raise RunError."""


class SshConnector:
    """A `Connector` to a run on another machine, for the first connection and all later ones."""

    def __init__(
        self, address: SshAddress, command: str = "", runs_dir: str = "", launch: str = ""
    ) -> None:
        """`command`, `runs_dir`, `launch`: see `remote_command`."""
        self.address = address
        self._command = command
        self._runs_dir = runs_dir
        self._launch = launch
        self._first: SshProcess | None = None
        self._denied_at: float | None = None

    def begin(self, choose: Choose, interactive: bool = True) -> str:
        """Make the first connection, for which ssh may ask on the terminal; returns the run's name.

        `choose` picks the run when the address names none and the host has several. Raises
        RunError.
        """
        process = self._start(batch=not interactive)
        try:
            greeting = self._check(asyncio.run(process.greeting()))
            if greeting.kind == "choose":
                asyncio.run(process.answer(choose(greeting.runs)))
                greeting = self._check(asyncio.run(process.greeting()))
            if greeting.kind != "connected":
                raise RunError(f"{self.address.host} offers no run", "name one: ssh://host/RUN")
        except SshEnded as ended:
            process.close()
            raise self._why_refused(ended) from ended
        except NoGreeting as error:
            process.close()
            raise self._not_a_relay(str(error)) from error
        except BaseException:
            process.close()
            raise
        self.address = replace(self.address, run=greeting.run)
        self._first = process
        return greeting.run

    def connect_rank(self) -> socket.socket:
        """A blocking socket to the run of a launch, for a training process; waits until that run
        listens. ssh ends with the socket. Raises RunError."""
        self.begin(lambda offered: offered[0].name, interactive=False)
        process, self._first = self._first, None
        assert process is not None
        process.socket.setblocking(True)
        return process.socket

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[socket.socket]:
        """A connected socket: at first the one that `begin` has connected, later a new one. Raises
        Unreachable and RunGone."""
        process, self._first = self._first, None
        if process is None:
            process = await self._reconnect()
        try:
            yield process.socket
        except PeerClosed as closed:
            if words := await process.last_words():
                raise PeerClosed(f"ssh: {words}") from closed
            raise
        finally:
            process.close()

    async def _reconnect(self) -> SshProcess:
        if self._denied_at is not None:
            left = self._denied_at + DENIED_PAUSE_S - time.monotonic()
            if left > 0:
                raise Unreachable(
                    f"{self.address.host} refused the login, no attempt for {rough_duration(left)}"
                )
            self._denied_at = None
        try:
            process = self._start(batch=True)
            try:
                greeting = await process.greeting(RECONNECT_S)
                if greeting.state:
                    raise RunGone(greeting.message, greeting.hint, greeting.state)
                self._check(greeting)
            except BaseException:
                process.close()
                raise
        except SshEnded as ended:
            raise self._why_unreachable(ended) from ended
        except NoGreeting as error:
            raise RunGone(str(error)) from error
        return process

    def _start(self, batch: bool) -> SshProcess:
        remote = remote_command(self.address.run, self._command, self._runs_dir, self._launch)
        command = ssh_command(self.address, remote, batch)
        if shutil.which(command[0]) is None:
            raise RunError(f"there is no {command[0]} on this machine", "install OpenSSH's client")
        try:
            return SshProcess(command, interactive=not batch)
        except OSError as error:
            raise RunError(f"cannot start {command[0]}: {error.strerror}") from error

    def _check(self, greeting: RelayGreeting) -> RelayGreeting:
        host = self.address.host
        if greeting.kind == "missing":
            raise RunError(
                f"{host} has no tui-trainer on the path of a login without a terminal",
                f"install it there, or give its path with --remote-command or "
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

    def _why_unreachable(self, ended: SshEnded) -> Unreachable:
        """Why a later connection failed."""
        words = ended.stderr or "ssh gave no reason"
        if "Permission denied" in words or "Host key verification failed" in words:
            self._denied_at = time.monotonic()
            return Unreachable(
                f"{self.address.host} refuses: {words}",
                "ssh cannot ask for a password while the app is on the screen: attach again, or "
                "use a key with an agent",
            )
        if ended.exit_status is None:
            words = f"no answer within {rough_duration(RECONNECT_S)}"
        return Unreachable(f"ssh: {words}")

    def _why_refused(self, ended: SshEnded) -> RunError:
        """Why the first connection failed."""
        host, words, noise = self.address.host, ended.stderr, ended.noise[-200:]
        port = f"-p {self.address.port} " if self.address.port else ""
        if ended.exit_status == 255:
            return RunError(
                f"ssh cannot reach {self.address.destination}: {words or 'it gave no reason'}",
                f"try it alone: ssh {port}{self.address.destination} true",
            )
        if ended.exit_status in (126, 127):
            return RunError(
                f"{host} cannot run the remote command: {words or noise}",
                f"give the path of tui-trainer there with --remote-command or "
                f"${REMOTE_COMMAND_VARIABLE}",
            )
        return self._not_a_relay(words or noise or f"exit status {ended.exit_status}")

    def _not_a_relay(self, why: str) -> RunError:
        return RunError(
            f"what answers at {self.address.host} is not tui-trainer's relay: "
            f"{single_line(why, 400)}",
            f"is it tui-trainer {__version__} there, and does a login without a terminal end in a "
            "plain shell?",
        )
