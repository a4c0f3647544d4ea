"""`tui-trainer run [options] script.py [its own arguments]`: which argument is whose."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

from tui_trainer.cli.errors import UsageError
from tui_trainer.cli.options import RunOptions
from tui_trainer.config.errors import near_miss


@dataclass(frozen=True)
class Script:
    """A Python program to train with: a file, a folder with a `__main__.py`, or a module as
    `python -m` would find it."""

    target: str
    arguments: tuple[str, ...]
    module: bool = False

    @property
    def title(self) -> str:
        """As its user would have typed it for python, less its arguments."""
        return f"-m {self.target}" if self.module else _path(self.target).name

    @property
    def stem(self) -> str:
        """What a run of it is called after: the file or module, less its folders or packages."""
        return self.target.rpartition(".")[2] if self.module else _path(self.target).stem

    def check(self) -> None:
        """Raises UsageError when it is not there. Whether it is good Python, the run will say."""
        if self.module:
            _check_module(self.target)
        else:
            _check_file(Path(self.target))


def split(arguments: Sequence[str]) -> tuple[list[str], Script | None]:
    """Our own options, and the script with everything after it, which is the script's alone.

    None when no script is named: the options may ask for help. Raises UsageError.
    """
    valued = _options_with_a_value()
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
            ours.append(token)
            if token in valued and rest:
                ours.append(rest.pop(0))
            continue
        return ours, Script(token, tuple(rest))
    return ours, None


def _options_with_a_value() -> frozenset[str]:
    hints = get_type_hints(RunOptions)
    return frozenset(
        "--" + each.name.replace("_", "-")
        for each in fields(RunOptions)
        if hints[each.name] is not bool
    )


def _path(target: str) -> Path:
    return Path(os.path.abspath(target))  # `.` has a name as well


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
            near_miss(path.name, siblings) if siblings else "check the path",
        )
    else:
        try:
            path.open("rb").close()
        except OSError as fault:
            raise UsageError(f"cannot read {path}: {fault.strerror}") from fault


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())[:200]
    except OSError:
        return []


def _check_module(name: str) -> None:
    import sys

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
