"""An interpreter that has imported libraries once and is forked for each process of a test.

    python -P -m tests.fork_server FD LIBRARY…

Each request on the Unix socket FD names the arguments, environment and directory of a process and
brings its standard streams; the answer is the process's number. `tests/processes.py` asks.

Importing PyTorch and, at the first optimizer, its compiler takes a process four seconds of
processor time; a fork has them at once. Most modules of tui_trainer do nothing when they are
imported and are imported here, too: a tenth of a second for each command, app or training. PyTorch
and what imports it are hidden until the process imports one of them.

A process that has a terminal, the app, or that starts a run otherwise gets a fork server of its
own, a child of it: the run process that it starts is forked there. So does a worker of
pytest-xdist, for the processes of its tests.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import importlib
import importlib.abc
import importlib.machinery
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import types
import warnings
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

STACKS = "TUI_TRAINER_TEST_STACKS"
HUGE_PAGE = 1 << 21
MADV_COLLAPSE = 25
HIDDEN = ("torch", "functorch", "safetensors", "tui_trainer")
"""Packages whose modules are hidden if they were imported after PyTorch."""


class HiddenTorch(importlib.abc.MetaPathFinder):
    """Finds `torch`, and what imports it, as if they had not been imported, and gives what has
    been. `early` are the modules that were there before it."""

    def __init__(self, early: Collection[str]) -> None:
        names = [name for name in sys.modules if name.partition(".")[0] in HIDDEN]
        self.modules = {name: sys.modules.pop(name) for name in names if name not in early}
        for package, name, module in self._members():
            if vars(package).get(name) is module:
                delattr(package, name)

    def _members(self) -> Iterator[tuple[types.ModuleType, str, types.ModuleType]]:
        """The hidden modules of packages that are not hidden: package, name and module."""
        for full_name, module in self.modules.items():
            package, _, name = full_name.rpartition(".")
            if package and package not in self.modules:
                yield sys.modules[package], name, module

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.modules:
            return None
        spec = self.modules[name].__spec__
        assert spec is not None
        loader = HiddenModule(self, self.modules[name])
        found = importlib.machinery.ModuleSpec(name, loader, origin=spec.origin, loader_state=spec)
        found.submodule_search_locations = spec.submodule_search_locations
        return found

    def show(self) -> None:
        """Hide nothing from now on."""
        sys.modules.update(self.modules)
        for package, name, module in self._members():
            setattr(package, name, module)
        with contextlib.suppress(ValueError):  # two threads may import two of them
            sys.meta_path.remove(self)


class HiddenModule(importlib.abc.Loader):
    """Loads one of them. Whichever it is, `torch` is imported first, by name: an import hook sees
    that as it sees the `import torch` of a module that is executed."""

    def __init__(self, finder: HiddenTorch, module: types.ModuleType) -> None:
        self.finder = finder
        self.module = module

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self.module

    def exec_module(self, module: types.ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
        if module.__name__ == "torch":
            self.finder.show()
        else:
            importlib.import_module("torch")


def serve(asking: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Answer requests until there are no more; returns a request and its streams in each child."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(asking, 1 << 20, 3)
        if not data:
            os._exit(0)
        middle = os.fork()
        if middle == 0:
            # Its parent ends at once, so that it becomes a child of who asked (a subreaper).
            child = os.fork()
            if child != 0:
                asking.sendall(str(child).encode())
                os._exit(0)
            asking.close()
            return json.loads(data), descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(middle, 0)
        asking.sendall(b"\n")  # the child has its new parent


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Take over what a new process gets from its parent."""
    if request["session"]:
        os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    if request["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for descriptor in descriptors:
        if descriptor > 2:
            os.close(descriptor)
    before = os.environ.get("PYTHONPATH", "")
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    if request["directory"] is not None:
        os.chdir(request["directory"])
    sys.path[:] = [path for path in sys.path if path not in before.split(os.pathsep)]
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        raw = open(number, "wb", 0 if unbuffered else -1, closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(
            raw,
            old.encoding,
            old.errors,
            line_buffering=number == 2 or os.isatty(number),
            write_through=unbuffered,
        )
        stream.mode = "w"
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def use_huge_pages() -> None:
    """Put the memory of this process into pages of 2 MiB: a fork of 220 MB then takes 3 ms of
    processor time instead of 14, and its first writes a third less. Nothing where Linux cannot."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        for line in maps.read().splitlines():
            addresses, access, *_, name = (*line.split(), "")[:6]
            if access != "rw-p" or name not in ("", "[heap]"):
                continue
            first, end = (int(address, 16) for address in addresses.split("-"))
            for page in range(-(-first // HUGE_PAGE) * HUGE_PAGE, end - HUGE_PAGE + 1, HUGE_PAGE):
                madvise(page, HUGE_PAGE, MADV_COLLAPSE)


def fork_where_the_same(asking: socket.socket) -> type[subprocess.Popen[Any]]:
    """`tests.processes.Popen`, which asks this server from now on."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.insert(0, root)
    from tests import processes

    sys.path.remove(root)
    processes.fork_in(asking)
    return processes.Popen


def write_stacks_on_signal() -> None:
    """Write the stacks of all threads to $TUI_TRAINER_TEST_STACKS when SIGUSR1 comes."""
    if path := os.environ.pop(STACKS, ""):
        faulthandler.register(signal.SIGUSR1, open(path, "w"))  # noqa: SIM115


def run(arguments: list[str]) -> None:
    """Behave like `python arguments…`: `-m MODULE`, `-c CODE` or a file, perhaps after `-P`."""
    safe = arguments[0] == "-P"
    kind, *rest = arguments[1:] if safe else arguments
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=__builtins__, __annotations__={})
    sys.modules["__main__"] = main
    # With -P python has no such entry; sys.flags cannot be set here, and scripts replace the first.
    nowhere = os.path.join(os.sep, "nonexistent", "safe-path")
    if kind == "-m":
        sys.argv = ["-m", *rest[1:]]
        sys.path.insert(0, nowhere if safe else os.getcwd())
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, nowhere if safe else "")
        exec(compile(rest[0], "<string>", "exec", dont_inherit=True), main.__dict__)
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, nowhere if safe else os.path.dirname(os.path.realpath(kind)))
        main.__file__ = os.path.abspath(kind)
        with open(kind) as file:
            code = compile(file.read(), kind, "exec", dont_inherit=True)
        exec(code, main.__dict__)


def leave(ending: BaseException | None) -> NoReturn:
    """End as an interpreter does, but leave a quarter of a second's work to the system: it frees
    the memory of a process sooner than Python takes PyTorch apart."""
    status = 0
    if isinstance(ending, SystemExit):
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if not isinstance(ending.code, int | None):
            print(ending.code, file=sys.stderr)
    elif ending is not None:
        sys.last_type, sys.last_value = type(ending), ending
        sys.last_traceback = ending.__traceback__
        sys.excepthook(type(ending), ending, ending.__traceback__)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if isinstance(ending, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def fork_own_server(descriptors: list[int]) -> tuple[socket.socket | None, Any]:
    """In the parent the socket of a server that was forked from this process, and None; None and
    the request in each process that this server forks."""
    asking, other = socket.socketpair()
    if os.fork() != 0:
        other.close()
        return asking, None
    asking.close()
    for descriptor in descriptors:
        os.close(descriptor)
    return None, serve(other)


if __name__ == "__main__":
    _filters = warnings.filters[:]
    _asking = socket.socket(fileno=int(sys.argv[1]))
    _early: set[str] = set()
    for _name in sys.argv[2:]:
        if _name == "torch":
            _early |= sys.modules.keys()
        __import__(_name)
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
    sys.modules.pop("tests", None)
    if "torch" in sys.modules:  # hidden before any fork: hiding writes to every module
        sys.meta_path.insert(0, HiddenTorch(_early))
    gc.collect()
    gc.freeze()
    for _finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        _finalizer.atexit = False  # half of what a process took that did nothing
    use_huge_pages()
    _request, _descriptors = serve(_asking)
    _own: socket.socket | None = None
    while _own is None and (_request["starts"] or _request["worker"]):
        _own, _forked = fork_own_server(_descriptors)
        if _forked is not None:
            _request, _descriptors = _forked
    warnings.filters[:] = _filters
    become(_request, _descriptors)
    if _own is not None:
        _popen = fork_where_the_same(_own)
        if _request["starts"]:
            subprocess.Popen = _popen  # type: ignore[misc]
            write_stacks_on_signal()
    _ending: BaseException | None = None
    try:
        run(_request["arguments"])
    except BaseException as _fault:
        _ending = _fault
    leave(_ending)
