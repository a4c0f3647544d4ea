"""Flags and helpers shared by the commands for existing runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter, validators

from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.live_settings import parse_changes
from tui_trainer.protocol.settings import SettingChange
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.runs.registry import list_runs, newest, one_of_each_process, resolve
from tui_trainer.store.schema import StoreError

if TYPE_CHECKING:
    from tui_trainer.client.connection import RunClient
    from tui_trainer.protocol.inspection import Inspected, InspectionRequest, InspectionResult

T = TypeVar("T", bound="InspectionResult")
ATTEMPTS = 5
NAMED = "the run: its name, a prefix of it, or its directory"
RunName = Annotated[
    str | None,
    Parameter(help=f"{NAMED} (default: the newest live one, else the newest)", show_default=False),
]
LiveRunName = Annotated[
    str | None,
    Parameter(help=f"{NAMED} (default: the live one, if there is only one)", show_default=False),
]
RunsDir = Annotated[
    Path | None,
    Parameter(
        help="directory of the runs (also $TUI_TRAINER_RUNS_DIR)",
        show_default=False,
        negative=(),
        metavar="DIR",
    ),
]


def flag(help: str) -> Parameter:
    """A flag that is off by default."""
    return Parameter(help=help, negative=(), show_default=False)


Rank = Annotated[
    int,
    Parameter(
        help="the rank whose tensors are inspected, of a run with several processes",
        metavar="N",
        negative=(),
        validator=validators.Number(gte=0),
    ),
]


def run_and_changes(
    given: Sequence[str], required: bool = False
) -> tuple[str | None, list[str], tuple[SettingChange, ...]]:
    """(name of the run, changes as given, parsed changes) from arguments such as `RUN lr=3e-4`.
    Raises UsageError, also if changes are `required` and none is given."""
    changes = [each for each in given if "=" in each]
    names = [each for each in given if "=" not in each]
    if len(names) > 1:
        raise UsageError(f"{names[1]!r} is not a change of a setting", "for example lr=3e-4")
    try:
        parsed = parse_changes(changes) if changes or required else ()
    except ConfigurationError as error:
        raise UsageError(error.message, error.hint) from error
    return (names[0] if names else None), changes, parsed


def inspect_running(
    client: RunClient, request: InspectionRequest, waits: Callable[[Inspected], bool]
) -> Inspected:
    """The answer to a request for something that a running run keeps only from the first request
    on: the request is repeated while `waits(answer)`, at most ATTEMPTS times. Raises RunError."""
    for _ in range(ATTEMPTS):
        answer = client.inspect(request)
        if not waits(answer) or client.poll(0).status.state != "running":
            break
    if answer.state == "failed":
        raise RunError(answer.message, answer.hint)
    return answer


def result_of(answer: Inspected, kind: type[T]) -> T:
    """The result of a request, which must be of type `kind`. Raises CommandError."""
    if not isinstance(answer.result, kind):
        raise CommandError("the run sent an unexpected answer")
    return answer.result


def confirmed(question: str) -> bool:
    """Ask on standard error, since standard output may be a file."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip().casefold() in ("y", "yes")
    except EOFError:
        return False


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """Turn a RunError into the error message of the command."""
    try:
        yield
    except RunError as error:
        raise CommandError(error.message, error.hint) from error


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[None]:
    """Turn a recording that cannot be opened into the error message of the command."""
    try:
        yield
    except (StoreError, OSError) as error:
        hint = f"tui-trainer show {directory} shows what is known"
        raise CommandError(str(error), hint) from error


def choose_run_by_name(run: str | None, runs_dir: Path | None, live: bool = True) -> RunEntry:
    """The named run, or the newest live one (the newest of all if none is and `live` is False)."""
    if run is not None:
        return resolve(run, runs_dir)
    runs = one_of_each_process(list_runs(runs_dir))
    if live or any(each.live for each in runs):
        return newest(runs)
    return newest(runs, live=False)


def require_single_run(run: str | None, runs_dir: Path | None) -> RunEntry:
    """The named run, or the only live one. Raises RunError if there are several."""
    if run is not None:
        return resolve(run, runs_dir)
    runs = one_of_each_process(list_runs(runs_dir))
    live = [each for each in runs if each.live]
    if len(live) > 1:
        names = ", ".join(each.name for each in live[:8])
        raise RunError(f"{len(live)} runs are live", f"name one: {names}")
    return newest(runs)
