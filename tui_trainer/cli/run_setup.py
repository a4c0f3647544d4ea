"""Creates a run's directory and its `run.json` from the options."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.cli.options import RunOptions
from tui_trainer.cli.script import Script
from tui_trainer.config.errors import ConfigurationError, did_you_mean
from tui_trainer.config.live_settings import parse_changes
from tui_trainer.config.options import parse_size
from tui_trainer.config.ranks import rank_here
from tui_trainer.config.run_spec import (
    RUN_NAME,
    SPEC_FILE,
    RunSpec,
    create_run_directory,
    read_state,
    remove_run,
    runs_directory,
    saved_breakpoints,
    write_spec,
)
from tui_trainer.protocol.messages import Breakpoint
from tui_trainer.protocol.schema import Scalar, SourceInfo
from tui_trainer.runs.boot_log import BOOT_LOG
from tui_trainer.runs.checkpoints import ResumePoint
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.security import check_directory


def check_options(options: RunOptions) -> None:
    """Raise UsageError for options that cannot work, before anything is created."""
    if options.json and options.plain:
        raise UsageError("both --json and --plain are given", "choose one of them")
    if options.detach and (options.json or options.plain or options.in_app):
        raise UsageError(
            "--detach shows nothing and outlives this terminal", "leave out the other option"
        )
    if options.name is not None and not RUN_NAME.fullmatch(options.name):
        raise UsageError(f"--name cannot be {options.name!r}", "use letters, digits and . _ + -")
    if options.attention_pattern is not None:
        _check_pattern(options.attention_pattern)
    if options.ranks_over is not None:
        _check_ranks_over(options.ranks_over)
    check_rules(options.rules)
    for target in options.alert:
        _check_alert(target)


def _check_breakpoints(options: RunOptions, script: Script | None, launched: bool) -> None:
    """Raise UsageError for a condition that cannot be met in this run."""
    if options.breakpoints:
        from tui_trainer.cli.commands.breakpoints import check_condition

        rank = rank_here() if script else None
        processes = options.nproc if launched else rank.world_size if rank else 1
        for condition in options.breakpoints:
            check_condition(condition, "--break: ", processes)


def _check_ranks_over(given: str) -> None:
    """Raise RunError or UsageError unless this is the address of a machine."""
    from tui_trainer.client.ssh import parse_address

    address = parse_address(given)
    if address.run:
        raise UsageError("--ranks-over names a machine, not a run", f"leave out /{address.run}")


def _check_alert(target: str) -> None:
    """Raise UsageError for an empty command and for an address that cannot be called."""
    from tui_trainer.record.alerts import can_be_called

    if not can_be_called(target):
        raise UsageError(f"--alert cannot be {target!r}", "give a command or an http(s) address")


def check_rules(text: str) -> None:
    """Raise UsageError unless this is a list of changes to the rules."""
    if not text:
        return
    from tui_trainer.findings.rule import SettingsError, parse_settings
    from tui_trainer.findings.rules import RULES

    try:
        parse_settings(text, RULES)
    except SettingsError as error:
        hint = did_you_mean(error.given, error.known) if error.known else ""
        raise UsageError(
            f"--rules: {error}", hint or "such as over-fitting=off,loss-diverges.rise=3"
        ) from error


def _check_pattern(pattern: str) -> None:
    """Raise UsageError unless the pattern has the groups that name a layer and its projections."""
    try:
        groups = re.compile(pattern).groupindex.keys()
    except re.error as error:
        raise UsageError(f"--attention-pattern is not a regular expression: {error}") from error
    if "layer" not in groups or not (groups >= {"q", "k", "v"} or "qkv" in groups):
        raise UsageError(
            "--attention-pattern lacks named groups: (?P<layer>…), and (?P<q>…), (?P<k>…) and "
            "(?P<v>…), or (?P<qkv>…)",
            r"such as '(?P<layer>.*)\.((?P<q>wq)|(?P<k>wk)|(?P<v>wv))\.weight'",
        )


def prepare(
    task: str,
    options: RunOptions,
    configuration: Mapping[str, Scalar] | None = None,
    script: Script | None = None,
    resume_point: ResumePoint | None = None,
    launcher: tuple[str, ...] = (),
    local_rank_option: str = "",
    stem: str = "",
) -> RunSpec:
    """Create the run directory and write the spec; on CommandError nothing is left behind. `stem`:
    beginning of the run's name; by default the name of the script, or the task."""
    check_options(options)
    _check_breakpoints(options, script, bool(launcher))
    _check_text(script)
    stem = stem or (re.sub(r"[^\w+-]+", "-", script.stem).strip("-") if script else task)
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
            launcher=launcher,
            local_rank_option=local_rank_option,
            working_directory=os.getcwd(),
            command=("tui-trainer", *sys.argv[1:]),
            source=find_source(os.getcwd()),
            start_paused=options.paused,
            budget=options.measuring_budget,
            watch_nonfinite=options.watch_nonfinite,
            attention_pattern=options.attention_pattern,
            rules=options.rules,
            checkpoint_every=options.checkpoint_every,
            breakpoints=_breakpoints(options, resume_point),
            alerts=options.alert,
            keep_checkpoints=options.keep_checkpoints,
            snapshots=_snapshot_bytes(options),
            changes=_changes(options, script),
            resume=str(resume_point.checkpoint) if resume_point else None,
            parent=str(resume_point.run.directory) if resume_point else "",
            branch_step=resume_point.step if resume_point else None,
        )
        write_spec(spec)
    except OSError as error:
        raise CommandError(
            f"cannot create a run in {runs_directory(options.runs_dir)}: {error.strerror or error}",
            "--runs-dir DIR or $TUI_TRAINER_RUNS_DIR keeps runs elsewhere",
        ) from error
    return spec


def _changes(options: RunOptions, script: Script | None) -> tuple[str, ...]:
    """The changes of settings before the first step. Raises UsageError."""
    if script is not None and options.set:
        raise UsageError("--set does not work with a script", "give the script its own options")
    try:
        if options.set:
            parse_changes(options.set)
        return options.set
    except ConfigurationError as error:
        raise UsageError(f"--set: {error.message}", error.hint) from error


def _snapshot_bytes(options: RunOptions) -> int:
    """The memory limit of --snapshots in bytes. Raises UsageError."""
    try:
        return parse_size(options.snapshots) if options.snapshots else 0
    except ConfigurationError as error:
        raise UsageError(f"--snapshots: {error.message}", error.hint) from error


def _breakpoints(options: RunOptions, resume_point: ResumePoint | None) -> tuple[Breakpoint, ...]:
    """The breakpoints of the options; without any, those of the run that is continued."""
    conditions = list(options.breakpoints)
    if options.break_on_finding is not None:
        conditions.append(f'finding(level="{options.break_on_finding}")')
    if not conditions and resume_point is not None:
        return saved_breakpoints(resume_point.run.directory)
    return tuple(Breakpoint(n, condition) for n, condition in enumerate(conditions, 1))


def _check_text(script: Script | None) -> None:
    """Refuse arguments and paths that are not text, which a run's files cannot hold."""
    for given in (*sys.argv, os.getcwd(), *(script.arguments if script else ())):
        try:
            given.encode()
        except UnicodeEncodeError as error:
            raise CommandError(
                f"{given!a} is not valid UTF-8", "arguments and paths must be text"
            ) from error


def _check_parent(options: RunOptions) -> None:
    """Refuse a directory that other users can write to, since they could impersonate a run there.
    Raises CommandError."""
    parent = runs_directory(options.runs_dir)
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        check_directory(parent)
    except RunError as error:
        raise CommandError(error.message, error.hint) from error


def _make_directory(stem: str, options: RunOptions) -> tuple[str, Path]:
    if options.name is None:
        return create_run_directory(stem, options.runs_dir)
    parent = runs_directory(options.runs_dir)
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory = parent / options.name
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError as error:
        raise UsageError(
            f"a run named {options.name} already exists in {parent}",
            "choose another --name, or leave it out",
        ) from error
    return options.name, directory


def discard(spec: RunSpec) -> None:
    """Remove the directory of a run that never began, unless something else is in it."""
    directory = Path(spec.directory)
    with contextlib.suppress(OSError):
        for name in (SPEC_FILE, BOOT_LOG):
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()


def discard_refused(spec: RunSpec) -> None:
    """Remove a run that could not start, once its reason has been printed; no other run."""
    state = read_state(spec.directory)
    if state is not None and state.state == "crashed" and state.refused:
        with contextlib.suppress(OSError):
            remove_run(Path(spec.directory))


# ---------------------------------------------------------------- git

GIT_TIMEOUT_S = 2.0
"""Limit of each of the two calls, so that a slow file system does not delay the start of a run."""
_GIT_READ_ONLY = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
"""Without GIT_OPTIONAL_LOCKS=0, `git status` would refresh the index."""


def find_source(directory: str, timeout_s: float = GIT_TIMEOUT_S) -> SourceInfo | None:
    """The commit, the branch and the state of the working tree that contains `directory`.

    Called before the run begins, so that git is never a child of the training process.
    None outside a working tree, before the first commit, and when git is missing or too slow.
    `dirty` is None when only the second call was too slow.
    """
    head = _git(directory, timeout_s, "rev-parse", "HEAD", "--abbrev-ref", "HEAD")
    if head is None or len(named := head.split()) != 2:
        return None
    commit, branch = named
    changes = _git(directory, timeout_s, "status", "--porcelain", "--untracked-files=no")
    dirty = None if changes is None else changes != ""
    return SourceInfo(commit, dirty, "" if branch == "HEAD" else branch)


def _git(directory: str, timeout_s: float, *arguments: str) -> str | None:
    """The output of git; None when git fails, is missing or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            cwd=directory,
            env={**os.environ, **_GIT_READ_ONLY},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
