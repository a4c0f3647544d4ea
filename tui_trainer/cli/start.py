"""What the commands do: make the run, then show it in the way that this terminal allows."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from tui_trainer.cli.directory import check_options, prepare
from tui_trainer.cli.errors import UsageError, say
from tui_trainer.cli.options import RunOptions, StartOptions
from tui_trainer.cli.script import Script
from tui_trainer.cli.showing import showing_for, why_no_screen
from tui_trainer.config.resolve import resolve, to_flat
from tui_trainer.config.spec import RunSpec
from tui_trainer.protocol.describe import Scalar
from tui_trainer.tasks.definition import TaskDefinition

if TYPE_CHECKING:
    from tui_trainer.ui.launch import LaunchRequest


def start_task(
    task: TaskDefinition, preset: str | None, overrides: dict[str, Scalar], options: RunOptions
) -> int:
    """Train a task; returns the exit status. Raises ConfigurationError and CommandError."""
    check_options(options)
    if options.resume is not None:
        from tui_trainer.cli.resuming import resumed

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
        from tui_trainer.cli.runs.detaching import start_detached

        return start_detached(spec)
    showing = showing_for(options)
    if showing.note:
        say(showing.note)
    if showing.kind == "screen" and options.in_app:
        from tui_trainer.cli.runs.in_app import show_in_app

        return show_in_app(spec, options.ascii, options.slow_link)
    if showing.kind == "screen":
        from tui_trainer.cli.screen import show_run

        return show_run(spec, options.ascii, options.slow_link)
    from tui_trainer.cli.lines import show_lines

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
