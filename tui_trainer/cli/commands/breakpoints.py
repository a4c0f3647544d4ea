"""`break`: list, add, change and delete the breakpoints of a live run."""

from __future__ import annotations

from typing import Annotated

import msgspec
from cyclopts import Parameter, validators
from rich.text import Text

from tui_trainer.breakpoints.expression import ExpressionError, parse
from tui_trainer.cli.commands.common import RunsDir, cli_errors, flag, require_single_run
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.client.connection import RunClient
from tui_trainer.protocol import actions
from tui_trainer.protocol.actions import Action
from tui_trainer.protocol.messages import Breakpoint

# Whole numbers that a message can carry.
HITS = validators.Number(gte=0, lt=2**63)
NUMBER = validators.Number(gte=1, lt=2**63)


def numbered(text: str) -> Parameter:
    """An option that takes the number of a breakpoint."""
    return Parameter(help=text, metavar="N", negative=(), show_default=False, validator=NUMBER)


def break_(
    run: Annotated[
        str | None,
        Parameter(
            help="the run (default: the live one, if there is only one) and a condition in quotes; "
            "without a condition, its breakpoints are listed",
            show_default=False,
        ),
    ] = None,
    condition: Annotated[str | None, Parameter(show=False)] = None,
    /,
    *,
    once: Annotated[bool, flag("with a condition or --enable: disable it after it fired")] = False,
    ignore: Annotated[
        int | None,
        Parameter(
            help="with a condition or --enable: the first N hits have no effect",
            metavar="N",
            negative=(),
            show_default=False,
            validator=HITS,
        ),
    ] = None,
    log: Annotated[
        bool, flag("with a condition or --enable: write to the log instead of pausing")
    ] = False,
    delete: Annotated[list[int] | None, numbered("delete breakpoint N")] = None,
    disable: Annotated[list[int] | None, numbered("disable breakpoint N")] = None,
    enable: Annotated[list[int] | None, numbered("enable breakpoint N")] = None,
    json: Annotated[bool, flag("print the breakpoints as one JSON array")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """pause a run when a condition is met, or list its breakpoints"""
    name, wanted = _run_and_condition([each for each in (run, condition) if each is not None])
    if wanted is not None:
        check_condition(wanted)
    requested: list[Action] = []
    if wanted is not None:
        requested.append(actions.AddBreakpoint(wanted, ignore=ignore or 0, once=once, log_only=log))
    elif (once or log or ignore is not None) and not enable:
        raise UsageError(
            "--once, --ignore and --log belong to a condition",
            "tui-trainer break RUN 'loss > 5' --once, or --enable 2 --once",
        )
    for number in enable or ():
        change = actions.ChangeBreakpoint(
            number, enabled=True, ignore=ignore, once=once or None, log_only=log or None
        )
        requested.append(change)
    requested += [actions.ChangeBreakpoint(number, enabled=False) for number in disable or ()]
    requested += [actions.DeleteBreakpoint(number) for number in delete or ()]
    with cli_errors():
        found = require_single_run(name, runs_dir)
        with RunClient.connect(found, "tui-trainer break", read_only=not requested) as client:
            for action in requested:
                ack = client.command_in_control(action)
                if not ack.ok:
                    raise CommandError(f"{found.name} refuses: {ack.message}", ack.hint)
                if not json:
                    print(f"{found.name}: {ack.message}", flush=True)
            breakpoints = client.poll(0).status.breakpoints
    if json:
        print(msgspec.json.encode(breakpoints).decode(), flush=True)
    elif not requested:
        print("\n".join(listing(breakpoints)) or f"{found.name} has no breakpoints", flush=True)
    return 0


def check_condition(condition: str, option: str = "", processes: int | None = None) -> None:
    """Raise UsageError, pointing at the place, for a condition that cannot be understood, or that
    reads a rank that a run of `processes` processes does not have (None: not known yet)."""
    try:
        expression = parse(condition)
        if processes is not None:
            expression.check_ranks(processes)
    except ExpressionError as error:
        raise UsageError(f"{option}{error.pointed}", error.hint) from error


def listing(breakpoints: tuple[Breakpoint, ...]) -> list[str]:
    """A table of breakpoints, one a line."""
    if not breakpoints:
        return []
    table = new_table(("#", "condition", "hits", "state"), right=("#", "hits"))
    for each in breakpoints:
        table.add_row(
            str(each.number), Text(each.condition), f"{each.hits:,}", Text(state_of(each))
        )
    return [line.plain for line in table_lines(table)]


def state_of(breakpoint: Breakpoint) -> str:
    """`on, once, log only`"""
    return ", ".join(["on" if breakpoint.enabled else "off", *breakpoint.properties])


def _run_and_condition(given: list[str]) -> tuple[str | None, str | None]:
    """Parse `RUN`, `CONDITION`, `RUN CONDITION`."""
    if len(given) == 2:
        return given[0], given[1]
    if given and (given[0] == "nonfinite" or any(sign in given[0] for sign in '<>=!(" ')):
        return None, given[0]
    return (given[0] if given else None), None
