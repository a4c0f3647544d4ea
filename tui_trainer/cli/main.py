"""The command line: parses it, runs the command, and turns errors into a message and a status. The
commands are listed in `cli/commands/__init__.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter
from cyclopts.exceptions import UnusedCliTokensError

from tui_trainer import __version__
from tui_trainer.cli import commands
from tui_trainer.cli.errors import (
    FAULT,
    INTERRUPTED,
    USAGE,
    CommandError,
    UsageError,
    discard_stdout,
    notify,
    report_internal_error,
    unknown,
)
from tui_trainer.cli.installed_tasks import load_task, task_names, usable_tasks
from tui_trainer.cli.options import CheckOptions, RunOptions, StartOptions
from tui_trainer.config.errors import ConfigurationError

ABOUT = (
    "The debugger for neural-network training, in the terminal.\n\n"
    "Without a command it opens the start screen. `tui-trainer gpt` trains a small GPT and shows "
    "it live; `tui-trainer run train.py` does so with your own script. Without a terminal the same "
    "commands print plain progress lines. `tui-trainer gpt --help` lists the options of a command."
)
TASKS = Group("Train", sort_key=0)
OTHER = Group("Other", sort_key=200)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return the exit status. Raises only SystemExit."""
    given = list(arguments)
    try:
        return _dispatch(given)
    except CommandError as error:
        notify(error.message, error.hint)
        return error.status
    except ConfigurationError as error:
        notify(error.message, error.hint)
        return USAGE
    except CycloptsError as error:
        message, hint = _message_of(error)
        notify(message, hint or _help_hint(given))
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        discard_stdout()
        return FAULT
    except Exception as error:
        report_internal_error(error)
        return FAULT


def _message_of(error: CycloptsError) -> tuple[str, str]:
    """Message and hint of a cyclopts error."""
    if isinstance(error, UnusedCliTokensError):
        extra = " ".join(error.unused_tokens or [])
        return f"unexpected argument {extra}", "options begin with --"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return f"{error.argument.name} needs a value", ""
    message, _, suggestion = str(error).strip().partition(" Did you mean ")
    message = message[:1].lower() + message[1:]
    return message.rstrip("."), f"did you mean {suggestion}" if suggestion else ""


def _help_hint(given: Sequence[str]) -> str:
    command = f" {given[0]}" if given and not given[0].startswith("-") else ""
    return f"tui-trainer{command} --help lists the options"


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else ""
    if first == "run":
        return _run_script(arguments[1:])
    if first == "check":
        return _check(arguments[1:])
    if first in commands.COMMANDS or first in commands.HIDDEN:
        result = _call(_app((), with_runs=True), arguments)
    elif first and not first.startswith("-"):
        names = task_names()
        if first not in names:
            raise _unknown_command(first, [*names, "run", "check", *commands.COMMANDS])
        result = _call(_app([first]), arguments)
    else:
        result = _call(_app(task_names(), with_runs=True), arguments)
    return result if isinstance(result, int) else 0


def _call(app: App, arguments: list[str]) -> object:
    return app(arguments, exit_on_error=False, print_error=False, result_action="return_value")


def _unknown_command(given: str, known: list[str]) -> UsageError:
    if given.endswith(".py") or Path(given).is_file():
        return UsageError(f"there is no command {given}", f"try: tui-trainer run {given}")
    if given == "help":
        return UsageError("there is no command help", "try: tui-trainer --help")
    return unknown("command", given, known)


def _app(names: Sequence[str], with_runs: bool = False) -> App:
    """The commands. Only the tasks in `names` are loaded, since loading takes time."""
    from tui_trainer.cli.options import task_command
    from tui_trainer.cli.start import start_screen, start_task

    app = App(name="tui-trainer", help=ABOUT, version=__version__, help_format="plaintext")
    app["--help"].group = app["--version"].group = OTHER
    tasks = [load_task(names[0])] if len(names) == 1 else usable_tasks(names)
    for task in tasks:
        app.command(task_command(task, start_task, RunOptions), name=task.name, group=TASKS)
    usage = "Usage: tui-trainer run [OPTIONS] SCRIPT|-m MODULE [ITS OWN ARGUMENTS]"
    app.command(_script_command, name="run", group=TASKS, usage=usage)
    usage = (
        "Usage: tui-trainer check [OPTIONS] SCRIPT|-m MODULE [ITS OWN ARGUMENTS]\n"
        "       tui-trainer check TASK [OPTIONS]"
    )
    app.command(_check_command, name="check", group=TASKS, usage=usage)
    if with_runs:
        commands.register(app)

    @app.default
    def without_a_command(
        *,
        options: Annotated[StartOptions, Parameter(name="*")] = StartOptions(),  # noqa: B008
    ) -> int:
        return start_screen(options)

    return app


ScriptArguments = Annotated[
    str,
    Parameter(
        help="the script, or -m and a module, followed by its own arguments", show_default=False
    ),
]


def _script_command(
    *script: ScriptArguments,
    options: Annotated[RunOptions, Parameter(name="*")] = RunOptions(),  # noqa: B008
) -> RunOptions:
    """your own PyTorch script, unmodified"""
    return options


def _check_command(
    *script: ScriptArguments,
    options: Annotated[CheckOptions, Parameter(name="*")] = CheckOptions(),  # noqa: B008
) -> CheckOptions:
    """run some steps of a script or a task without a screen, and print what is wrong"""
    return options


def _check(arguments: list[str]) -> int:
    from tui_trainer.cli.script import split

    ours, script = split(arguments, CheckOptions, "check")
    if script is not None and not script.module and script.target in task_names():
        return _check_task(script.target, [*ours, *script.arguments])
    options = _call(_app(()), ["check", *ours])
    if not isinstance(options, CheckOptions):  # help was printed
        return 0
    if script is None:
        raise UsageError("check needs a script or a task", "tui-trainer check --steps 300 train.py")
    from tui_trainer.cli.commands.check import check_script

    return check_script(script, options)


def _check_task(name: str, arguments: list[str]) -> int:
    """`check TASK`, with the options of the task besides those of check."""
    from tui_trainer.cli.commands.check import check_task
    from tui_trainer.cli.options import task_command

    app = App(name="tui-trainer check", help_format="plaintext", version_flags=())
    app.command(task_command(load_task(name), check_task, CheckOptions), name=name)
    result = _call(app, [name, *arguments])
    return result if isinstance(result, int) else 0


def _run_script(arguments: list[str]) -> int:
    from tui_trainer.cli.script import split
    from tui_trainer.cli.start import start_script

    ours, script = split(arguments, RunOptions, "run")
    options = _call(_app(()), ["run", *ours])
    if not isinstance(options, RunOptions):  # help was printed
        return 0
    if script is None and options.resume is not None:
        return _dispatch([_resumed_task(options), *ours])
    if script is None:
        raise UsageError("run needs a script", "tui-trainer run train.py, or run -m package.train")
    return start_script(script, options)


def _resumed_task(options: RunOptions) -> str:
    """The task of the run that `run --resume RUN` continues. Raises CommandError for a script."""
    from tui_trainer.cli.commands.common import cli_errors
    from tui_trainer.runs.checkpoints import find_resume_point

    with cli_errors():
        return find_resume_point(options.resume or "", options.runs_dir).spec.task
