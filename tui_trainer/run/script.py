"""Running somebody's unmodified script so that it notices nothing.

It gets its own `sys.argv`, `sys.path[0]` and a real `__main__` module, so that pickling its classes
and starting worker processes (fork, spawn, forkserver) work; the working directory, the signal
handlers and the process are simply its own.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import io
import os
import runpy
import sys
import traceback
import types
from dataclasses import dataclass
from typing import Any

from tui_trainer.config.errors import ConfigurationError

OUR_DIRECTORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_kept_alive: list[types.ModuleType] = []


@dataclass(frozen=True)
class Program:
    """A script or module, compiled, and the `__main__` that it shall run in."""

    code: types.CodeType
    module: types.ModuleType
    argv: tuple[str, ...]
    path_entry: str

    def run(self) -> None:
        """Execute it to its end; every exception passes."""
        sys.argv = list(self.argv)
        if sys.flags.safe_path:
            sys.path.insert(0, self.path_entry)
        else:
            sys.path[0] = self.path_entry
        _kept_alive.append(sys.modules["__main__"])  # its globals may still be in use
        sys.modules["__main__"] = self.module
        exec(self.code, self.module.__dict__)


def load_script(path: str, arguments: tuple[str, ...]) -> Program:
    """As `python path arguments`: of a file, or of a folder with a `__main__.py`. Raises
    ConfigurationError when there is no such file, SyntaxError when it is not Python."""
    if os.path.isdir(path):
        return _load_folder(path, arguments)
    try:
        with io.open_code(os.path.abspath(path)) as file:
            source = file.read()
    except FileNotFoundError:
        raise ConfigurationError(f"there is no script {path}", _hint_for_missing(path)) from None
    except OSError as fault:
        raise ConfigurationError(f"cannot read {path}: {fault.strerror or fault}") from None
    absolute = os.path.abspath(path)  # as python itself does; argv keeps what was typed
    code = compile(source, absolute, "exec", dont_inherit=True)
    loader = importlib.machinery.SourceFileLoader("__main__", absolute)
    module = _main_module(absolute, loader)
    folder = os.path.dirname(os.path.realpath(path))
    return Program(code, module, (path, *arguments), folder)


def _load_folder(path: str, arguments: tuple[str, ...]) -> Program:
    entry = os.getcwd() if path == "." else os.path.join(os.getcwd(), path)
    spec = importlib.machinery.PathFinder.find_spec("__main__", [entry])
    if spec is None or not isinstance(spec.loader, importlib.abc.InspectLoader):
        raise ConfigurationError(
            f"{path} is a folder without a __main__.py", "name the script in it that trains"
        )
    code = spec.loader.get_code("__main__")
    assert code is not None  # it is Python or there is a SyntaxError
    return Program(code, _module_of(spec), (path, *arguments), entry)


def load_module(name: str, arguments: tuple[str, ...]) -> Program:
    """As `python -m name arguments`. Raises ConfigurationError when it cannot be found."""
    if sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    else:
        sys.path[0] = os.getcwd()
    try:
        _, spec, code = runpy._get_module_details(name, ConfigurationError)  # type: ignore[attr-defined]
    except ConfigurationError as fault:
        raise ConfigurationError(f"cannot run module {name}: {fault}") from None
    finally:
        if sys.flags.safe_path:
            del sys.path[0]
    return Program(code, _module_of(spec), (spec.origin, *arguments), os.getcwd())


def _module_of(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
    module = _main_module(spec.origin or "", spec.loader)
    module.__spec__ = spec
    module.__package__ = spec.parent
    module.__dict__["__cached__"] = spec.cached
    return module


def _main_module(path: str, loader: Any) -> types.ModuleType:
    module = types.ModuleType("__main__")
    module.__dict__.update(
        __file__=path,
        __builtins__=builtins,
        __loader__=loader,
        __spec__=None,
        __package__=None,
        __cached__=None,
        __annotations__={},
        __doc__=None,
    )
    return module


def _hint_for_missing(path: str) -> str:
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        return f"there is no folder {folder} either"
    found = sorted(entry for entry in os.listdir(folder) if entry.endswith(".py"))
    if not found:
        return f"there is no Python file in {folder}"
    return f"in {folder} there is {', '.join(found[:8])}"


# ---------------------------------------------------------------- how it ended


def exit_status(leaving: SystemExit) -> int:
    """What python would leave with; text is printed to stderr, as python does."""
    code = leaving.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def print_exception(fault: BaseException) -> None:
    """The traceback as python would have printed it, without our frames."""
    if sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(fault), fault, _without_our_beginning(fault.__traceback__))
        return
    print(format_exception(fault), end="", file=sys.stderr, flush=True)


def format_exception(fault: BaseException) -> str:
    """The traceback as text, without our frames."""
    told = traceback.TracebackException.from_exception(fault, compact=True)
    _strip(told)
    return "".join(told.format())


def _strip(told: traceback.TracebackException | None) -> None:
    if told is None:
        return
    kept = [frame for frame in told.stack if not _ours(frame.filename)]
    told.stack = traceback.StackSummary.from_list(kept)
    _strip(told.__cause__)
    _strip(told.__context__)
    for part in told.exceptions or ():
        _strip(part)


def _without_our_beginning(trace: types.TracebackType | None) -> types.TracebackType | None:
    while trace is not None and _ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _ours(filename: str) -> bool:
    # The shipped tasks are the program that runs, like a script.
    inside = filename.startswith(OUR_DIRECTORY)
    return inside and not filename.startswith(OUR_DIRECTORY + "tasks")
