"""What the commands do: make the run, then show it in the way that this terminal allows."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from typing import TYPE_CHECKING

from tui_trainer.cli.directory import Script, check_options, discard, prepare
from tui_trainer.cli.errors import CommandError, UsageError, say
from tui_trainer.cli.options import RunOptions, StartOptions
from tui_trainer.cli.screen import screen_for, why_no_screen
from tui_trainer.client.launch import Launched, launch
from tui_trainer.config.run_spec import RunSpec, find_socket
from tui_trainer.config.training import resolve, to_flat
from tui_trainer.protocol.schema import Scalar
from tui_trainer.tasks.definition import TaskDefinition

if TYPE_CHECKING:
    from tui_trainer.client.launch import LaunchRequest


def start_task(
    task: TaskDefinition, preset: str | None, overrides: dict[str, Scalar], options: RunOptions
) -> int:
    """Train a task; returns the exit status. Raises ConfigurationError and CommandError."""
    check_options(options)
    if options.resume is not None:
        from tui_trainer.cli.resume import resumed

        configuration, branch = resumed(task, preset, overrides, options)
        return _show(prepare(task.name, options, configuration, branch=branch), options)
    configuration = to_flat(resolve(task, preset, overrides))
    return _show(prepare(task.name, options, configuration), options)


def start_script(script: Script, options: RunOptions) -> int:
    """Train with a script; returns the exit status, its own if it ended. Raises CommandError."""
    check_options(options)
    if options.resume is not None:
        raise UsageError(
            "--resume cannot go on with a script", "give the script its own option for it"
        )
    if options.in_app:
        raise UsageError(
            "--in-app cannot train with a script", "a script has the main thread of a process"
        )
    script.check()
    return _show(prepare("script", options, script=script), options)


def _show(spec: RunSpec, options: RunOptions) -> int:
    if options.detach:
        pass  # MOVED

        return start_detached(spec)
    showing = screen_for(options)
    if showing.note:
        say(showing.note)
    if showing.kind == "screen" and options.in_app:
        from tui_trainer.cli.in_process import show_in_app

        return show_in_app(spec, options.ascii, options.slow_link)
    if showing.kind == "screen":
        from tui_trainer.cli.screen import show_run

        return show_run(spec, options.ascii, options.slow_link)
    from tui_trainer.cli.in_process import show_lines

    if spec.start_paused:
        say(f"paused before the first step; to go on: {_resume_command(spec, options)}")
    return show_lines(spec, "json" if showing.kind == "json" else "plain")


def _resume_command(spec: RunSpec, options: RunOptions) -> str:
    kept = [] if options.runs_dir is None else ["--runs-dir", str(options.runs_dir)]
    return shlex.join(["tui-trainer", "resume", spec.name, *kept])


def start_screen(options: StartOptions) -> int:
    """The start screen, for those who gave no command. Raises UsageError off a terminal."""
    if reason := why_no_screen():
        raise UsageError(reason, "say what to train: tui-trainer gpt, or tui-trainer --help")
    from tui_trainer.cli.registry import task_names, usable_tasks
    from tui_trainer.cli.screen import show_start

    tasks = {task.name: task for task in usable_tasks(task_names())}

    def make(request: LaunchRequest) -> RunSpec:
        return spec_for(request, tasks, options)

    return show_start(make, tuple(tasks.values()), options.ascii, options.slow_link)


def spec_for(
    request: LaunchRequest, tasks: dict[str, TaskDefinition], options: StartOptions
) -> RunSpec:
    """The run that was asked for on the start screen, made. Raises ConfigurationError and
    CommandError."""
    wanted = RunOptions(runs_dir=options.runs_dir, paused=request.paused)
    if request.script:
        script = Script(request.script, tuple(request.arguments))
        script.check()
        return prepare("script", wanted, script=script)
    configuration = resolve(tasks[request.task], overrides=request.settings)
    return prepare(request.task, wanted, to_flat(configuration))


# ---- detaching
# `--detach`: start a run, say its name, and leave it to itself.


LISTENS_WITHIN_S = 30.0
"""It listens before it imports torch: a tenth of this on a slow disk."""


def start_detached(spec: RunSpec) -> int:
    """Start the run process, wait until others can find it, and print the run's name alone on
    stdout, for `RUN=$(tui-trainer gpt --detach)`. Raises CommandError when it does not start."""
    try:
        launched = launch(spec)
    except OSError as fault:
        discard(spec)
        raise CommandError(f"cannot start the run process: {fault}") from fault
    _wait_until_started(launched)
    print(spec.name, flush=True)
    if sys.stderr.isatty():
        print(f"  tui-trainer attach {spec.name} shows it", file=sys.stderr)
    return 0


def _wait_until_started(launched: Launched) -> None:
    deadline = time.monotonic() + LISTENS_WITHIN_S
    while find_socket(launched.spec.directory) is None:
        status = launched.process.poll()
        if status is not None:
            said = launched.last_words()
            discard(launched.spec)
            raise CommandError(f"the run process ended at once (exit status {status})", said)
        if time.monotonic() > deadline:
            with contextlib.suppress(OSError):
                launched.process.terminate()
            raise CommandError("the run process does not come up", launched.last_words())
        time.sleep(0.02)
