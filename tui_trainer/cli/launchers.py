"""Finds the launcher in a command line: `tui-trainer run torchrun --nproc-per-node=2 train.py`, and
the one that `--nproc` stands for.

The launcher is started with the run process in place of the script, so that each of the processes
that it starts is traced.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tui_trainer.cli.errors import UsageError
from tui_trainer.cli.script import Script

_ANY_PROGRAM = {"torchrun": "--no-python", "accelerate": "--no_python", "deepspeed": "--no_python"}
"""Launchers, and their option to start any program instead of a Python script."""
_MODULE_OPTIONS = ("-m", "--module")
_TORCHRUN_MODULES = ("torch.distributed.run", "torch.distributed.launch")


@dataclass(frozen=True)
class Launch:
    """A script, and the command that starts its processes; () for none."""

    script: Script
    command: tuple[str, ...] = ()


def find_launch(script: Script, nproc: int | None) -> Launch:
    """The launch that a command line asks for. Raises UsageError."""
    found = _launcher_of(script)
    if found is None:
        if nproc is None or nproc == 1:
            return Launch(script)
        return Launch(
            script, (*_torchrun(), "--standalone", f"--nproc-per-node={nproc}", "--no-python")
        )
    command, option, rest = found
    if nproc is not None:
        raise UsageError(
            f"--nproc starts a launcher, and {script.target} is one",
            f"say how many processes to {script.target}",
        )
    return _split(command, option, rest)


def _torchrun() -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "torch.distributed.run")


def _launcher_of(script: Script) -> tuple[tuple[str, ...], str, Sequence[str]] | None:
    """(command, its option for any program, its further arguments) of a launcher."""
    if script.module:
        if script.target in _TORCHRUN_MODULES:
            return _torchrun(), "--no-python", script.arguments
        return None
    option = _ANY_PROGRAM.get(os.path.basename(script.target))
    if option is None or (Path(script.target).is_file() and os.sep not in script.target):
        return None
    path = shutil.which(script.target)
    if path is None:
        raise UsageError(f"there is no command {script.target}", "is it installed?")
    if os.path.basename(path) == "accelerate":
        if not script.arguments or script.arguments[0] != "launch":
            raise UsageError("accelerate trains with `accelerate launch`")
        return (path, "launch"), option, script.arguments[1:]
    return (path,), option, script.arguments


def _split(command: tuple[str, ...], option: str, arguments: Sequence[str]) -> Launch:
    """Split a launcher's arguments into its options and the script with its own."""
    for place, argument in enumerate(arguments):
        before = arguments[:place]
        if argument in _MODULE_OPTIONS:
            rest = arguments[place + 1 :]
            if rest and not rest[0].startswith("-"):
                return Launch(
                    Script(rest[0], tuple(rest[1:]), module=True), (*command, *before, option)
                )
        elif not argument.startswith("-") and (
            argument.endswith(".py") or Path(argument, "__main__.py").is_file()
        ):
            script = Script(argument, tuple(arguments[place + 1 :]))
            return Launch(script, (*command, *before, option))
    raise UsageError(
        f"no script was found in the arguments of {os.path.basename(command[0])}",
        "name it with its ending .py, or give its module right after -m",
    )
