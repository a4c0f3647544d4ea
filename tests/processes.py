"""Processes for tests: as `subprocess` starts them, without waiting for an import of PyTorch.

Most of what the suite takes is the start of interpreters: two seconds of processor time for
`import torch`, two more at the first optimizer. `Popen` and `run` here are those of `subprocess`,
but where they can they fork an interpreter that has PyTorch already (`tests/fork_server.py`): a
real process with its own number, signals, streams and exit status, a child of the test.

`subprocess` itself starts it where that is not the same: when the start of an interpreter is what
is tested, when libraries read a variable of the environment as they are imported, on systems other
than Linux. With TUI_TRAINER_TEST_COLD=1 every process is started that way.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import json
import os
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLD = bool(os.environ.get("TUI_TRAINER_TEST_COLD")) or not sys.platform.startswith("linux")
READ_AT_START = ("PYTHON", "OMP_", "GOMP_", "MKL_", "KMP_", "OPENBLAS_", "LD_", "LC_", "LANG")
"""What begins with one of these takes effect as an interpreter starts or a library is loaded."""
UNDERSTOOD = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "GOMP_SPINCOUNT")
"""But these are set when a process is forked, or change nothing of a process with one thread."""
LIBRARIES = (
    *("asyncio", "cyclopts", "cyclopts.config", "cyclopts.help", "docstring_parser", "jinja2"),
    *("msgspec", "numpy", "numpy.ma", "platformdirs", "plotext", "psutil"),
    *("rich.console", "rich.live", "rich.panel", "rich.table", "sqlite3"),
    *("tui_trainer.cli.main", "tui_trainer.cli.start", "tui_trainer.run.host"),
    *("tui_trainer.run.output", "tui_trainer.run.script"),
    *("tui_trainer.run.sinks.jsonlines", "tui_trainer.run.sinks.plain"),
    *("tui_trainer.cli.commands.autograd", "tui_trainer.cli.commands.compare"),
    *("tui_trainer.cli.commands.control", "tui_trainer.cli.commands.experiments"),
    "tui_trainer.cli.commands.show",
    *("tui_trainer.client.connection", "tui_trainer.comparison.divergence"),
)
"""What commands import, without PyTorch and Textual."""
WITH_TORCH = (
    *(*LIBRARIES, "numpy.ctypeslib", "PIL.Image", "textual.app"),
    *("tui_trainer.ui.app", "tui_trainer.ui.replay_app", "tui_trainer.ui.screens.dashboard"),
    *("safetensors", "tui_trainer.inspector.errors", "tui_trainer.models", "tui_trainer.settings"),
    *("tui_trainer.run.task_training", "tui_trainer.tasks.gpt.config"),
    *("tui_trainer.tasks.vit.config", "tui_trainer.travel"),
    *("torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.profiler._cupti_monitor"),
    *("torch.distributed.fsdp", "torch.distributed.optim"),
    "safetensors.torch",
    *("tui_trainer.inspector.checked_rerun", "tui_trainer.inspector.inspector"),
    *("tui_trainer.probes", "tui_trainer.run.checkpoints", "tui_trainer.run.frameworks"),
    *("tui_trainer.run.progress", "tui_trainer.tasks.gpt.training"),
    *("tui_trainer.tasks.vit.training", "tui_trainer.travel.time_travel"),
)
"""What an app or a training imports as well. Modules of tui_trainer that come after PyTorch are
hidden with it until they are imported: only those that import it may come after it."""
PR_SET_CHILD_SUBREAPER = 36


def read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a process which is forked would heed too late."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_START) and name not in UNDERSTOOD
    }


class _Server:
    """A fork server of this process."""

    def __init__(self, asking: socket.socket) -> None:
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.asking = asking
        self.lock = threading.Lock()

    @classmethod
    def start(cls, libraries: tuple[str, ...]) -> _Server:
        """Start one that imports `libraries`."""
        asking, other = socket.socketpair()
        server = cls(asking)
        command = [sys.executable, "-P", "-m", "tests.fork_server", str(other.fileno())]
        command += libraries
        root = str(Path(__file__).parents[1])
        paths = [root, server.environment.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            command,
            env={**server.environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            pass_fds=(other.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        other.close()
        atexit.register(process.wait)
        atexit.register(asking.close)  # which comes first, and ends it
        return server

    def takes(self, environment: dict[str, str]) -> bool:
        """Whether a process with that environment is the same when it is forked."""
        return read_at_start(environment) == read_at_start(self.environment)

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """The number of a new child of this process."""
        with self.lock:
            prctl = ctypes.CDLL(None).prctl
            prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self.asking, [json.dumps(request).encode()], streams)
                answer = b""
                while not answer.endswith(b"\n"):
                    received = self.asking.recv(100)
                    assert received, "the fork server has ended"
                    answer += received
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        return int(answer)


_own: list[_Server] = []


def fork_in(asking: socket.socket) -> None:
    """From now on fork processes in the server at the other end."""
    _own[:] = [_Server(asking)]


@functools.cache
def _started(libraries: tuple[str, ...]) -> _Server:
    return _Server.start(libraries)


def _server(libraries: tuple[str, ...]) -> _Server:
    return _own[0] if _own and libraries is WITH_TORCH else _started(libraries)


def _take_terminal() -> None:
    """Make the terminal on standard input the controlling one of this process, a new session."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _forks(arguments: list[str]) -> bool:
    """Whether this is `python [-P] -m MODULE …`, `-c CODE …` or `FILE …`."""
    if not arguments or arguments[0] != sys.executable:
        return False
    rest = arguments[2:] if arguments[1:2] == ["-P"] else arguments[1:]
    return bool(rest) and (rest[0] in ("-m", "-c") or not rest[0].startswith("-"))


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen`, of a forked interpreter where that is the same; with `torch=False` of one
    that has not imported PyTorch, for commands that do not either: it ends sooner. `cold=True` is
    `subprocess.Popen`. With `starts=True`, or `--detach`, what the process itself starts is forked
    as well, and so are torchrun's processes. So it is with `terminal=True`, which asks for a new
    session: standard input becomes the controlling terminal. `worker=True` is for a process that
    imports this module: what it starts here is forked from its own start."""

    def __init__(
        self,
        args: Any,
        *,
        torch: bool = True,
        cold: bool = COLD,
        starts: bool = False,
        terminal: bool = False,
        worker: bool = False,
        **options: Any,
    ) -> None:
        self._libraries = WITH_TORCH if torch else LIBRARIES
        self._cold = cold or COLD
        self._starts = starts or terminal or "--detach" in args or "torch.distributed.run" in args
        self._terminal = terminal
        self._worker = worker
        super().__init__(args, **options)

    def _execute_child(  # type: ignore[override]
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: Any,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        startupinfo: Any,
        creationflags: Any,
        shell: Any,
        p2cread: int,
        p2cwrite: int,
        c2pread: int,
        c2pwrite: int,
        errread: int,
        errwrite: int,
        *rest: Any,
    ) -> None:
        new_session = rest[-2]
        arguments = [] if isinstance(args, (str, bytes)) else [os.fspath(each) for each in args]
        environment = dict(os.environ if env is None else env)
        if (
            self._cold
            or not _forks(arguments)
            or any((executable, preexec_fn, pass_fds, shell))
            or not _server(self._libraries).takes(environment)
        ):
            if self._terminal:
                preexec_fn = _take_terminal
            super()._execute_child(  # type: ignore[misc]
                *(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo),
                *(creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite),
                *rest,
            )
            return
        streams = [
            given if given != -1 else number
            for number, given in enumerate((p2cread, c2pwrite, errwrite))
        ]
        request = {
            "arguments": arguments[1:],
            "environment": environment,
            "directory": os.fspath(cwd) if cwd is not None else os.getcwd(),
            "session": bool(new_session),
            "starts": self._starts,
            "terminal": self._terminal,
            "worker": self._worker,
        }
        self.pid = _server(self._libraries).fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        )


def run(
    arguments: Any,
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` with such a process."""
    if capture_output:
        options["stdout"] = options["stderr"] = subprocess.PIPE
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(arguments, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(arguments, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done
