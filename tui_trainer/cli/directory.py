"""From the flags to a run's directory and its `run.json`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.cli.git import find_source
from tui_trainer.cli.options import RunOptions
from tui_trainer.config.errors import near_miss
from tui_trainer.config.run_spec import (
    SPEC_FILE,
    RunSpec,
    create_run_directory,
    remove_run,
    runs_directory,
    write_spec,
)
from tui_trainer.config.run_state import read_state
from tui_trainer.protocol.schema import Scalar
from tui_trainer.runs.boot_log import BOOT_LOG
from tui_trainer.runs.checkpoints import Branch
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.security import check_directory

# ---- script
# `tui-trainer run [options] script.py [its own arguments]`: which argument is whose.


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


_NAME = re.compile(r"[\w][\w.+-]{0,99}")


def check_options(options: RunOptions) -> None:
    """Refuse what cannot work before anything is made. Raises UsageError."""
    if options.json and options.plain:
        raise UsageError("both --json and --plain are given", "choose one of them")
    if options.detach and (options.json or options.plain or options.in_app):
        raise UsageError("--detach shows nothing and outlives this terminal", "leave out the other")
    if options.budget is not None and not 0 <= options.budget <= 1:
        raise UsageError(
            f"--budget cannot be {options.budget:g}", "it is a share of step time, such as 0.01"
        )
    if options.checkpoint_every is not None and options.checkpoint_every < 1:
        raise UsageError("--checkpoint-every must be at least 1", "it counts steps, such as 1000")
    if options.keep_checkpoints < 1:
        raise UsageError("--keep-checkpoints must be at least 1")
    if options.name is not None and not _NAME.fullmatch(options.name):
        raise UsageError(
            f"--name cannot be {options.name!r}", "letters, digits and . _ + - make a name"
        )
    if options.attention_pattern is not None:
        _check_pattern(options.attention_pattern)


def _check_pattern(pattern: str) -> None:
    """A pattern without its groups would find no layer, and say so only when torch is there."""
    try:
        groups = re.compile(pattern).groupindex.keys()
    except re.error as fault:
        raise UsageError(f"--attention-pattern is no regular expression: {fault}") from fault
    if "layer" not in groups or not (groups >= {"q", "k", "v"} or "qkv" in groups):
        raise UsageError(
            "--attention-pattern lacks named groups: (?P<layer>…), and (?P<q>…), (?P<k>…) and "
            "(?P<v>…), or (?P<qkv>…)",
            r"such as '(?P<layer>.*)\.((?P<q>asks)|(?P<k>asked)|(?P<v>told))\.weight'",
        )


def prepare(
    task: str,
    options: RunOptions,
    configuration: Mapping[str, Scalar] | None = None,
    script: Script | None = None,
    branch: Branch | None = None,
) -> RunSpec:
    """Make the run's directory and write its spec. Raises CommandError, leaving nothing behind."""
    check_options(options)
    _check_text(script)
    stem = re.sub(r"[^\w+-]+", "-", script.stem).strip("-") if script else task
    try:
        _check_parent(options)
        name, directory = _make_directory(stem or task, options)
        spec = RunSpec(
            name=name,
            directory=str(directory),
            task=task,
            configuration=dict(configuration or {}),
            script=script.target if script else None,
            module=script.module if script else False,
            arguments=script.arguments if script else (),
            working_directory=os.getcwd(),
            command=("tui-trainer", *sys.argv[1:]),
            source=find_source(os.getcwd()),
            start_paused=options.paused,
            budget=options.measuring_budget,
            attention_pattern=options.attention_pattern,
            checkpoint_every=options.checkpoint_every,
            keep_checkpoints=options.keep_checkpoints,
            resume=str(branch.checkpoint) if branch else None,
            parent=str(branch.run.directory) if branch else "",
            branch_step=branch.step if branch else None,
        )
        write_spec(spec)
    except OSError as fault:
        raise CommandError(
            f"cannot make a run in {runs_directory(options.runs_dir)}: {fault.strerror or fault}",
            "--runs-dir DIR or $TUI_TRAINER_RUNS_DIR keeps runs elsewhere",
        ) from fault
    return spec


def _check_text(script: Script | None) -> None:
    """What is kept of a run, and shown, is text: bytes that are none are refused at once."""
    for given in (*sys.argv, os.getcwd(), *(script.arguments if script else ())):
        try:
            given.encode()
        except UnicodeEncodeError as fault:
            raise CommandError(
                f"{given!a} is not valid UTF-8", "arguments and paths must be text"
            ) from fault


def _check_parent(options: RunOptions) -> None:
    """Where others can write, they could answer in a run's place: `ls` and `attach` trust no such
    directory, so no run is begun there. Raises CommandError."""
    parent = runs_directory(options.runs_dir)
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        check_directory(parent)
    except RunError as fault:
        raise CommandError(fault.message, fault.hint) from fault


def _make_directory(stem: str, options: RunOptions) -> tuple[str, Path]:
    if options.name is None:
        return create_run_directory(stem, options.runs_dir)
    parent = runs_directory(options.runs_dir)
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory = parent / options.name
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError as fault:
        raise UsageError(
            f"a run called {options.name} exists already in {parent}",
            "choose another --name, or leave it out",
        ) from fault
    return options.name, directory


def discard(spec: RunSpec) -> None:
    """Take away the directory of a run that never began, unless something else is in it."""
    directory = Path(spec.directory)
    with contextlib.suppress(OSError):
        for name in (SPEC_FILE, BOOT_LOG):
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()


def discard_refused(spec: RunSpec) -> None:
    """Take away what is left of a run that could not start, once its reason was told: nothing was
    measured, and `ls` is for runs. Of every other run nothing is touched."""
    said = read_state(spec.directory)
    if said is not None and said.state == "crashed" and said.refused:
        with contextlib.suppress(OSError):
            remove_run(Path(spec.directory))
