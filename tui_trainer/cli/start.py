"""Starts a run and shows it in the way that the options and this terminal allow."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import msgspec

from tui_trainer.cli.errors import CommandError, UsageError, notify
from tui_trainer.cli.options import RunOptions, StartOptions
from tui_trainer.cli.run_setup import check_options, discard, discard_refused, prepare
from tui_trainer.cli.script import LauncherCommand, Script, find_launch
from tui_trainer.cli.terminal import screen_for, why_no_screen
from tui_trainer.config.ranks import Rank, find_run, leave_note, rank_here
from tui_trainer.config.run_spec import RunSpec, find_socket, write_spec
from tui_trainer.config.training import from_flat, resolve, to_flat
from tui_trainer.learn.demos import Demo, find_demo
from tui_trainer.protocol.messages import Breakpoint
from tui_trainer.protocol.schema import SCRIPT, Scalar
from tui_trainer.runs.checkpoints import ResumePoint, find_resume_point
from tui_trainer.runs.errors import RunError
from tui_trainer.tasks.definition import TaskDefinition

DEMO_SNAPSHOTS = "64MB"

if TYPE_CHECKING:
    from tui_trainer.record.sink_items import Sink
    from tui_trainer.run.rank_client import Connect
    from tui_trainer.runs.launch import LaunchRequest, RunProcess


def start_task(
    task: TaskDefinition, preset: str | None, overrides: dict[str, Scalar], options: RunOptions
) -> int:
    """Train a task and return the exit status. Raises ConfigurationError and CommandError."""
    check_options(options)
    if options.resume is not None:
        configuration, resume_point = resumed(task, preset, overrides, options)
        return _show(prepare(task.name, options, configuration, resume_point=resume_point), options)
    configuration = to_flat(resolve(task, preset, overrides))
    return _show(prepare(task.name, options, configuration), options)


def start_script(script: Script, options: RunOptions) -> int:
    """Run a script and return its exit status. Raises CommandError."""
    check_options(options)
    if options.resume is not None:
        raise UsageError(
            "--resume does not work with a script", "use the script's own option for it"
        )
    if options.in_app:
        raise UsageError(
            "--in-app does not work with a script", "a script needs the main thread of a process"
        )
    launch = find_launch(script, options.nproc)
    launch.script.check()
    rank = rank_here()
    if rank is not None:
        return _start_rank(launch, rank, options)
    if options.ranks_over is not None:
        raise UsageError(
            "--ranks-over is for a process that a launcher has started on one of several machines",
            "torchrun --nnodes 2 … --no-python tui-trainer run --ranks-over ssh://HOST train.py",
        )
    spec = prepare(
        SCRIPT,
        options,
        script=launch.script,
        launcher=launch.command,
        local_rank_option=launch.local_rank_option,
    )
    return _show(spec, options)


def _start_rank(launch: LauncherCommand, rank: Rank, options: RunOptions) -> int:
    """Train in a process that a launcher has started: rank 0 records, the others join its run."""
    if launch.command:
        raise UsageError(
            "this process is one of several already", "leave out the second launcher, or --nproc"
        )
    if options.detach:
        raise UsageError(
            "--detach does not work in a process that a launcher waits for",
            "put it before the launcher: tui-trainer run --detach torchrun …",
        )
    if rank.rank:
        return _train_rank(launch.script, rank, options)
    if rank.restart and options.name is not None:  # the name is that of the first attempt
        options = replace(options, name=f"{options.name}-{rank.restart}")
    spec = prepare(SCRIPT, options, script=launch.script)
    try:
        leave_note(rank, spec.directory, options.runs_dir)
    except OSError as error:
        notify(f"the other ranks will not find this run: {error}")
    if not options.json and not options.plain:
        notify(f"{rank.world_size} processes, one run: tui-trainer attach {spec.name} shows it")
    return _show(spec, replace(options, plain=not options.json))


def _train_rank(script: Script, rank: Rank, options: RunOptions) -> int:
    from tui_trainer.run.output import redirect_stdout_to_stderr, use_line_buffering
    from tui_trainer.run.rank_host import train_rank

    if options.json:
        os.close(redirect_stdout_to_stderr())
    else:
        use_line_buffering()
    spec = RunSpec(
        name=f"rank-{rank.rank}",
        directory="",
        task=SCRIPT,
        script=script.target,
        module=script.module,
        arguments=script.arguments,
        working_directory=os.getcwd(),
        start_paused=options.paused,
        budget=options.measuring_budget,
    )
    return train_rank(spec, rank, _connect_to_rank_zero(rank, options))


def _connect_to_rank_zero(rank: Rank, options: RunOptions) -> Connect:
    """How this rank reaches the run that rank 0 records. Raises CommandError."""
    from tui_trainer.run.rank_client import connect_locally

    if rank.with_rank_zero:
        return connect_locally(lambda: find_run(rank.launch, options.runs_dir))
    if options.ranks_over is None:
        return lambda: _refuse_other_machine(rank)
    from tui_trainer.client.ssh import SshConnector, parse_address

    return SshConnector(parse_address(options.ranks_over), launch=rank.launch).connect_rank


def _refuse_other_machine(rank: Rank) -> NoReturn:
    raise RunError(
        "it is on another machine than rank 0 (to record it: tui-trainer run --ranks-over "
        f"ssh://{rank.master or 'HOST'})"
    )


def _show(spec: RunSpec, options: RunOptions) -> int:
    if options.detach:
        return start_detached(spec)
    check = screen_for(options)
    if check.note:
        notify(check.note)
    if check.kind == "screen" and options.in_app:
        from tui_trainer.cli.screen import show_in_app

        return show_in_app(spec, options.ascii, options.slow_link, options.pixels)
    if check.kind == "screen":
        from tui_trainer.cli.screen import show_run

        return show_run(spec, options.ascii, options.slow_link, pixels=options.pixels)
    if spec.start_paused:
        notify(f"paused before the first step; to continue: {_resume_command(spec, options)}")
    show = show_launched_lines if spec.launcher else show_lines
    return show(spec, "json" if check.kind == "json" else "plain")


def _resume_command(spec: RunSpec, options: RunOptions) -> str:
    directory = [] if options.runs_dir is None else ["--runs-dir", str(options.runs_dir)]
    return shlex.join(["tui-trainer", "resume", spec.name, *directory])


# ---------------------------------------------------------------- as lines


def show_lines(spec: RunSpec, kind: Literal["plain", "json"]) -> int:
    """Run in this process with plain or JSON lines on stdout; returns the exit status."""
    from tui_trainer.run.host import main

    status = main(spec, open_sink(kind))
    discard_refused(spec)
    return status


def show_launched_lines(spec: RunSpec, kind: Literal["plain", "json"]) -> int:
    """As `show_lines` for several processes: starts their launcher and returns its exit status."""
    from tui_trainer.runs.launch import run_command

    process = subprocess.Popen([*run_command(spec), f"--{kind}"])
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:  # the launcher receives SIGINT too, and ends its processes
            continue
    discard_refused(spec)
    return status if status >= 0 else 128 - status


def open_sink(kind: Literal["plain", "json"]) -> Sink:
    """The sink that writes to stdout. With `json`, everything else that this process and its
    children print to stdout goes to stderr, so that stdout is only JSON."""
    from tui_trainer.run.output import redirect_stdout_to_stderr, use_line_buffering
    from tui_trainer.run.sinks import Output
    from tui_trainer.run.sinks.jsonlines import JsonLines
    from tui_trainer.run.sinks.plain import PlainLines

    if kind == "json":
        return JsonLines(Output(redirect_stdout_to_stderr()))
    use_line_buffering()
    return PlainLines(Output(os.dup(1)))


# ---------------------------------------------------------------- on the start screen


def start_screen(
    options: StartOptions, *, mode: Literal["start", "learn"] = "start", lesson: str = ""
) -> int:
    """Show the start screen, or the pages to learn from. Raises UsageError without a terminal."""
    if reason := why_no_screen():
        raise UsageError(reason, "name what to train: tui-trainer gpt, or see tui-trainer --help")
    from tui_trainer.cli.installed_tasks import task_names, usable_tasks
    from tui_trainer.cli.screen import show_start

    tasks = {task.name: task for task in usable_tasks(task_names())}

    def create(request: LaunchRequest) -> RunSpec:
        return spec_for(request, tasks, options)

    return show_start(
        create,
        tuple(tasks.values()),
        options.ascii,
        options.slow_link,
        pixels=options.pixels,
        mode=mode,
        lesson=lesson,
    )


def spec_for(
    request: LaunchRequest, tasks: dict[str, TaskDefinition], options: StartOptions
) -> RunSpec:
    """Create the run chosen on the start screen. Raises ConfigurationError and CommandError."""
    wanted = RunOptions(runs_dir=options.runs_dir, paused=request.paused)
    if request.demo:
        return demo_spec(find_demo(request.demo), wanted, guided=True)
    if request.script:
        script = Script(request.script, tuple(request.arguments))
        script.check()
        return prepare(SCRIPT, wanted, script=script)
    configuration = resolve(tasks[request.task], overrides=request.settings)
    return prepare(request.task, wanted, to_flat(configuration))


def demo_spec(
    chosen: Demo, options: RunOptions, *, cured: bool = False, guided: bool = False, stem: str = ""
) -> RunSpec:
    """Create a run of a demo. `guided`: slow enough to be watched, and paused where the fault
    shows. `stem`: beginning of the run's name; by default the demo's. Raises CommandError."""
    script = Script(str(chosen.script), ("--cured",) if cured else ())
    # No budget: the steps are so short that, with a budget of 1 %, measurements would be too rare
    # for a finding before the end.
    options = replace(options, budget=0.0)
    if chosen.back and guided:
        options = replace(options, snapshots=DEMO_SNAPSHOTS)
    stem = stem or (f"{chosen.name}-cured" if cured else chosen.name)
    spec = prepare(SCRIPT, options, script=script, stem=stem)
    # Once, so that the learner can then continue without another pause.
    stops = (Breakpoint(1, chosen.breakpoint, once=True),) if guided and not cured else ()
    spec = msgspec.structs.replace(
        spec,
        title=chosen.title(cured),
        breakpoints=stops,
        steps_per_second=chosen.pace if guided else None,
        snapshots_every=chosen.back or None,
    )
    write_spec(spec)
    return spec


# ---------------------------------------------------------------- --detach

LISTEN_TIMEOUT_S = 30.0
"""How long a run may take to listen, which it does before it imports torch. On a slow disk it takes
a tenth of this."""


def start_detached(spec: RunSpec) -> int:
    """Start the run process, wait until it listens, and print only the run's name to stdout, for
    `RUN=$(tui-trainer gpt --detach)`. Raises CommandError when it does not start."""
    from tui_trainer.runs.launch import launch

    try:
        launched = launch(spec)
    except OSError as error:
        discard(spec)
        raise CommandError(f"cannot start the run process: {error}") from error
    _wait_until_started(launched)
    print(spec.name, flush=True)
    if sys.stderr.isatty():
        print(f"  tui-trainer attach {spec.name} shows it", file=sys.stderr)
    return 0


def _wait_until_started(launched: RunProcess) -> None:
    deadline = time.monotonic() + LISTEN_TIMEOUT_S
    while find_socket(launched.spec.directory) is None:
        status = launched.process.poll()
        if status is not None:
            words = launched.last_output()
            discard(launched.spec)
            raise CommandError(f"the run process exited at once (exit status {status})", words)
        if time.monotonic() > deadline:
            with contextlib.suppress(OSError):
                launched.process.terminate()
            raise CommandError("the run process does not start", launched.last_output())
        time.sleep(0.02)


# ---------------------------------------------------------------- --resume

_LENGTH = ("steps", "epochs")


def resumed(
    task: TaskDefinition,
    preset: str | None,
    overrides: Mapping[str, Scalar],
    options: RunOptions,
) -> tuple[dict[str, Scalar], ResumePoint]:
    """The parent's configuration with `overrides` applied, and the checkpoint to start from.

    Raises CommandError and ConfigurationError.
    """
    from tui_trainer.cli.commands.common import cli_errors

    with cli_errors():
        resume_point = find_resume_point(options.resume or "", options.runs_dir)
    parent = resume_point.spec
    if parent.task != task.name:
        raise UsageError(
            f"{resume_point.run.name} trained {parent.task}, not {task.name}",
            f"tui-trainer {parent.task} --resume {resume_point.run.name}",
        )
    if preset is not None:
        raise UsageError(
            "--preset cannot be given with --resume",
            f"the options are those of {resume_point.run.name}; override single ones instead",
        )
    values: dict[str, Scalar] = dict(parent.configuration)
    if any(overrides.get(name) is not None for name in _LENGTH):
        values.update(dict.fromkeys(_LENGTH))
    values["data"] = _resolve_data(parent.working_directory, values.get("data"))
    configuration = to_flat(from_flat(task.config, {**values, **overrides}))
    total = configuration.get("steps")
    if isinstance(total, int) and total <= resume_point.step:
        raise CommandError(
            f"{resume_point.run.name} has already made all of its {resume_point.step:,} steps",
            f"--steps {resume_point.step * 2} continues it",
        )
    _print_start(resume_point)
    _print_schedule_note(parent.configuration, configuration)
    return configuration, resume_point


def _print_start(resume_point: ResumePoint) -> None:
    reached = resume_point.run.reported.step
    beyond = f", which reached step {reached:,}" if reached > resume_point.step else ""
    print(
        f"continuing from step {resume_point.step:,} of {resume_point.run.name}{beyond}",
        file=sys.stderr,
    )


def _print_schedule_note(before: Mapping[str, Scalar], now: Mapping[str, Scalar]) -> None:
    """Print a note if the length has changed and the learning rate depends on it."""
    schedule = now.get("schedule")
    moved = any(before.get(name) != now.get(name) for name in _LENGTH)
    if moved and schedule != "constant":
        print(
            f"note: the {schedule} schedule ends at another step than before, so its learning "
            "rates differ from those of a run of this length",
            file=sys.stderr,
        )


def _resolve_data(directory: str, data: Scalar) -> Scalar:
    """The parent's `--data`, relative to where the parent was started."""
    if isinstance(data, str) and directory and not os.path.isabs(data):
        there = Path(directory) / Path(data).expanduser()
        return str(there) if there.exists() else data
    return data
