"""`tui-trainer run [options] script.py [arguments]`: the script and its own arguments, and the
launcher in `tui-trainer run [options] torchrun --nproc-per-node=2 train.py`."""

from __future__ import annotations

import difflib
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tui_trainer.cli.errors import UsageError
from tui_trainer.cli.options import RunOptions
from tui_trainer.config.errors import did_you_mean


@dataclass(frozen=True)
class Script:
    """A Python program that trains: a file, a folder with a `__main__.py`, or a module as for
    `python -m`."""

    target: str
    arguments: tuple[str, ...]
    module: bool = False

    @property
    def title(self) -> str:
        """`train.py`, or `-m package.module`."""
        return f"-m {self.target}" if self.module else _path(self.target).name

    @property
    def stem(self) -> str:
        """The file or module without folders or packages, for the name of its runs."""
        return self.target.rpartition(".")[2] if self.module else _path(self.target).stem

    def check(self) -> None:
        """Raise UsageError if there is no such program. The run reports errors in its code."""
        if self.module:
            _check_module(self.target)
        else:
            _check_file(Path(self.target))


def split(
    arguments: Sequence[str], options: type[Any] = RunOptions, command: str = "run"
) -> tuple[list[str], Script | None]:
    """Split into our own options and the script with its arguments.

    Everything after the script belongs to it. The script is None when none is named, since the
    options may ask for help. `options`: the class of our options. Raises UsageError.
    """
    flags = _flags(options)
    valued = [flag for flag, has_value in flags.items() if has_value]
    ours: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token == "-m":
            if not rest:
                raise UsageError(
                    "-m needs the name of a module", "tui-trainer run -m package.train"
                )
            return ours, Script(rest[0], tuple(rest[1:]), module=True)
        if token == "--" and rest:
            token = rest.pop(0)
        elif token.startswith("-") and token != "-":
            if token.partition("=")[0] not in (*flags, *HELP_FLAGS):
                raise _not_ours(token, rest, list(flags), command)
            ours.append(token)
            if token in valued and rest:
                ours.append(rest.pop(0))
            continue
        return ours, Script(token, tuple(rest))
    return ours, None


HELP_FLAGS = ("--help", "-h", "--version")


def _flags(options: type[Any]) -> dict[str, bool]:
    """The flags of a class of options, and whether each takes a value."""
    hints = get_type_hints(options, include_extras=True)
    named = {each.name: hints[each.name] for each in fields(options)}
    return {
        flag: get_args(hint)[0] is not bool
        for name, hint in named.items()
        for flag in (get_args(hint)[1].name or ("--" + name.replace("_", "-"),))
    }


def _not_ours(token: str, rest: Sequence[str], flags: Sequence[str], command: str) -> UsageError:
    """The error for an unknown option before the script: a misspelt option of ours, or an option of
    the script."""
    flag, _, given = token.partition("=")
    similar = difflib.get_close_matches(flag, flags, n=1, cutoff=0.75)
    if similar:
        hint = f"did you mean {similar[0]}?"
    else:
        scripts = [each for each in rest if each.endswith(".py")]
        script = scripts[0] if scripts else "train.py"
        value = [given] if given else rest[: rest.index(script)] if scripts else []
        made = " ".join([script, flag, *value])
        hint = f"options of the script go after the script: tui-trainer {command} {made}"
    return UsageError(f"{command} has no option {flag}", hint)


def _path(target: str) -> Path:
    return Path(os.path.abspath(target))  # so that `.` has a name


def _check_file(path: Path) -> None:
    if path.is_dir():
        if not (path / "__main__.py").is_file():
            raise UsageError(
                f"{path} is a folder without a __main__.py", "name the script in it that trains"
            )
    elif not path.exists():
        siblings = sorted(each.name for each in _listing(path.parent) if each.suffix == ".py")
        raise UsageError(
            f"there is no script {path}",
            did_you_mean(path.name, siblings) if siblings else "check the path",
        )
    else:
        try:
            path.open("rb").close()
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())[:200]
    except OSError:
        return []


def _check_module(name: str) -> None:
    sys.path.insert(0, "")
    try:
        # Only the first part: finding a sub-module would import its parents, and perhaps torch.
        found = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        found = None
    finally:
        sys.path.remove("")
    if found is None:
        raise UsageError(
            f"there is no module {name}", "it must be importable from here, as for python -m"
        )


# ---------------------------------------------------------------- launchers
# A launcher is started with the run process in place of the script, so that each of the processes
# that it starts is traced.

_ANY_PROGRAM = {"torchrun": "--no-python", "accelerate": "--no_python", "deepspeed": "--no_python"}
"""Launchers, and their option to start any program instead of a Python script."""
_MODULE_OPTIONS = ("-m", "--module")
_NO_LOCAL_RANK = "--no_local_rank"
"""Option of deepspeed, which otherwise puts `--local_rank=N` right after the program, into our own
arguments."""
_TORCHRUN_MODULES = ("torch.distributed.run", "torch.distributed.launch")


@dataclass(frozen=True)
class LauncherCommand:
    """A script, and the command that starts its processes; () for none."""

    script: Script
    command: tuple[str, ...] = ()
    local_rank_option: str = ""
    """See `RunSpec.local_rank_option`."""


def find_launch(script: Script, nproc: int | None) -> LauncherCommand:
    """The launch that a command line asks for. Raises UsageError."""
    found = _launcher_of(script)
    if found is None:
        if nproc is None or nproc == 1:
            return LauncherCommand(script)
        return LauncherCommand(
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


def _split(command: tuple[str, ...], option: str, arguments: Sequence[str]) -> LauncherCommand:
    """Split a launcher's arguments into its options and the script with its own."""
    for place, argument in enumerate(arguments):
        before = arguments[:place]
        if argument in _MODULE_OPTIONS:
            rest = arguments[place + 1 :]
            if rest and not rest[0].startswith("-"):
                script = Script(rest[0], tuple(rest[1:]), module=True)
                break
        elif not argument.startswith("-") and (
            argument.endswith(".py") or Path(argument, "__main__.py").is_file()
        ):
            script = Script(argument, tuple(arguments[place + 1 :]))
            break
    else:
        raise UsageError(
            f"no script was found in the arguments of {os.path.basename(command[0])}",
            "name it with its ending .py, or give its module right after -m",
        )
    if os.path.basename(command[0]) != "deepspeed":
        return LauncherCommand(script, (*command, *before, option))
    wanted = "" if _NO_LOCAL_RANK in before else "--local_rank"
    return LauncherCommand(script, (*command, *before, option, _NO_LOCAL_RANK), wanted)
