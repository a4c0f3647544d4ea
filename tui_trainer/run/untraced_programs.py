"""Reports the Python programs that a script starts by commands, which are not traced, with the
command that does it."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any

PYTHON = re.compile(r"python[\d.]*(\.exe)?")
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")
LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch")
OPTIONS_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")


class ProgramReports:
    """Between `install` and `remove`, calls `report(text)` once for each program."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._reported: set[str] = set()
        self._pid = os.getpid()
        self._restore: list[Callable[[], None]] = []

    def install(self) -> None:
        self._wrap(subprocess.Popen, "__init__", 1)
        self._wrap(os, "system", 0)

    def remove(self) -> None:
        while self._restore:
            self._restore.pop()()

    def _wrap(self, owner: Any, name: str, place: int) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._started(args[place] if len(args) > place else kwargs.get("args"))
            return original(*args, **kwargs)

        def restore() -> None:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)

        setattr(owner, name, wrapper)
        self._restore.append(restore)

    def _started(self, command: Any) -> None:
        """Never raises: this is called by the script's own code."""
        try:
            if os.getpid() != self._pid or (found := traced_command(command)) is None:
                return
            program, instead = found
            if program not in self._reported:
                self._reported.add(program)
                self._report(
                    f"{program} runs in a process of its own, which is not traced: if it trains, "
                    f"start it with {instead}"
                )
        except Exception:
            return


def traced_command(command: Any) -> tuple[str, str] | None:
    """(program, the command that traces it) if `command` starts a Python program of the user's."""
    words = _words(command)
    if any(os.path.basename(word) == "tui-trainer" for word in words):
        return None
    for place, word in enumerate(words):
        name = os.path.basename(word)
        if name in LAUNCHERS:
            script = next((w for w in words[place + 1 :] if w.endswith(".py")), None)
            return None if script is None else (script, f"tui-trainer run {name} … {script}")
        if word == sys.executable or PYTHON.fullmatch(name):
            return _of_python(words[place + 1 :])
        if place > 3:  # `env`, `nohup`, `CUDA_VISIBLE_DEVICES=0` and the like come before it
            break
    return None


def _words(command: Any) -> list[str]:
    if isinstance(command, (str, bytes)):
        text = os.fsdecode(command)
        return shlex.split(text, comments=True) if len(text) < 10_000 else []
    if isinstance(command, Sequence):
        return [os.fsdecode(word) for word in command]
    return []


def _of_python(arguments: list[str]) -> tuple[str, str] | None:
    rest = iter(arguments)
    for argument in rest:
        if argument in OPTIONS_WITH_VALUE:
            next(rest, None)
        elif argument == "-m":
            module = next(rest, "")
            if module in LAUNCHER_MODULES:
                script = next((word for word in rest if word.endswith(".py")), None)
                return None if script is None else (script, f"tui-trainer run torchrun … {script}")
            found = importlib.util.find_spec(module.partition(".")[0])
            if found is None or _is_installed(found.origin or ""):
                return None
            return f"-m {module}", f"tui-trainer run -m {module}"
        elif argument.startswith("-c"):
            return None
        elif not argument.startswith("-"):
            if not argument.endswith(".py") or _is_installed(os.path.abspath(argument)):
                return None
            return argument, f"tui-trainer run {argument}"
    return None


def _is_installed(path: str) -> bool:
    """Whether this is a file of Python or of a package, not a training of the user's."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return path in ("built-in", "frozen") or any(path.startswith(f + os.sep) for f in folders)
