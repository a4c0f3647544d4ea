"""`tui-trainer demo NAME`: a short training with one fault, and the same without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

from cyclopts import Parameter
from msgspec.structs import replace
from rich.console import Console
from rich.text import Text

from tui_trainer.cli.commands import compare
from tui_trainer.cli.commands.common import RunsDir, cli_errors, flag
from tui_trainer.cli.errors import CommandError, UsageError, notify, unknown
from tui_trainer.cli.options import RunOptions
from tui_trainer.cli.run_setup import prepare
from tui_trainer.cli.run_summary import RunSummary, summarize_run
from tui_trainer.cli.run_text import finding_lines
from tui_trainer.cli.script import Script
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.cli.terminal import why_no_screen
from tui_trainer.comparison.compared_runs import ComparedRun
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.findings.finding_order import finding_object
from tui_trainer.learn.demos import DEMOS, Demo
from tui_trainer.protocol.messages import Breakpoint
from tui_trainer.protocol.schema import SCRIPT
from tui_trainer.runs.launch import run_command
from tui_trainer.runs.registry import resolve

WIDTH = 92
TIMEOUT_S = 600.0
SCREENS = {"dashboard": "1", "attention": "2", "parameters": "3", "log": "5", "findings": "8"}
"""Key of each screen that a demo names."""


def demo(
    name: Annotated[
        str | None, Parameter(help="which one (default: list them)", show_default=False)
    ] = None,
    *,
    cured: Annotated[bool, flag("train without the fault")] = False,
    both: Annotated[
        bool, flag("train with and without it, then show both curves (default off a terminal)")
    ] = False,
    source: Annotated[bool, flag("print the program")] = False,
    plain: Annotated[bool, flag("print text instead of opening the screen")] = False,
    json: Annotated[bool, flag("print one JSON object")] = False,
    ascii: Annotated[bool, flag("draw with ASCII characters only")] = False,
    slow_link: Annotated[bool, flag("send less to the terminal")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """a short training with one fault: what it looks like, what names it, what cures it"""
    if name is None:
        return _list(json)
    by_name = {each.name: each for each in DEMOS}
    if name not in by_name:
        raise unknown("demo", name, by_name)
    if cured and both:
        raise UsageError("--both trains with and without the fault", "leave out --cured")
    chosen = by_name[name]
    if source:
        print(chosen.script.read_text(encoding="utf-8"), end="")
        return 0
    if both or plain or json or why_no_screen():
        return _train_both(chosen, runs_dir, plain, json, ascii)
    return _show(chosen, cured, RunOptions(ascii=ascii, slow_link=slow_link, runs_dir=runs_dir))


def _list(json: bool) -> int:
    if json:
        _print_json({"demos": [_object(each) for each in DEMOS]})
        return 0
    table = new_table(("DEMO", "WHAT NAMES IT", "WATCH"))
    for each in DEMOS:
        table.add_row(each.name, each.rule, f"{each.screen} ({SCREENS[each.screen]})")
    console = Console(highlight=False)
    for line in table_lines(table):
        console.print(line, soft_wrap=True)
    print("\ntui-trainer demo NAME starts one and stops where it goes wrong")
    return 0


def _object(chosen: Demo) -> dict[str, Any]:
    return {
        "name": chosen.name,
        "happens": chosen.happens,
        "screen": chosen.screen,
        "rule": chosen.rule,
        "breakpoint": chosen.breakpoint,
        "cure": chosen.cure,
        "set": chosen.live,
        "script": str(chosen.script),
    }


def _spec(chosen: Demo, cured: bool, options: RunOptions) -> RunSpec:
    script = Script(str(chosen.script), ("--cured",) if cured else ())
    return prepare(SCRIPT, options, script=script)


# ---------------------------------------------------------------- on the screen


def _show(chosen: Demo, cured: bool, options: RunOptions) -> int:
    """Open the screen to watch; the run pauses where it goes wrong."""
    from tui_trainer.cli.screen import show_run

    spec = _spec(chosen, cured, options)
    if not cured:  # once: after that the learner goes on without being stopped again
        spec = replace(spec, breakpoints=(Breakpoint(1, chosen.breakpoint, once=True),))
    message = first_message(chosen, cured)
    status = show_run(spec, options.ascii, options.slow_link, mode=chosen.screen, message=message)
    if not cured:
        print(f"\nthe cure: {chosen.cure}")
        print(f"  tui-trainer demo {chosen.name} --cured   trains without the fault")
        print(f"  tui-trainer demo {chosen.name} --both    shows both curves")
    return status


def first_message(chosen: Demo, cured: bool) -> str:
    """What will happen, where it pauses, and what can be done about it then."""
    if cured:
        return f"Cured: {chosen.cure}."
    live = f" When it pauses, E and {chosen.live} is the cure." if chosen.live else ""
    return (
        f"{chosen.happens[:1].upper()}{chosen.happens[1:]}. It pauses at {chosen.breakpoint}; "
        f"8 shows the findings, space goes on.{live}"
    )


# ---------------------------------------------------------------- both


def _train_both(chosen: Demo, runs_dir: Path | None, plain: bool, json: bool, ascii: bool) -> int:
    """Train with and without the fault, side by side; then compare."""
    notify(f"{chosen.name}: training with and without the fault")
    options = RunOptions(plain=True, runs_dir=runs_dir)
    specs = [_spec(chosen, cured, options) for cured in (False, True)]
    _run_to_end(specs)
    with cli_errors():
        entries = [resolve(spec.directory, runs_dir) for spec in specs]
        summaries = [summarize_run(entry) for entry in entries]
        compared = [ComparedRun(entry) for entry in entries]
    if json:
        _print_json(_result(chosen, specs, summaries))
    elif plain or why_no_screen():
        console = Console(highlight=False)
        for line in [*_report(chosen, specs, summaries), *compare.as_lines(compared)]:
            console.print(line, soft_wrap=True)
    else:
        return compare.open_screen(compared, ascii)
    return 0


def _run_to_end(specs: list[RunSpec]) -> None:
    """Both at once, each in a process of its own. Raises CommandError."""
    processes = [
        subprocess.Popen(
            [*run_command(spec), "--plain"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for spec in specs
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=TIMEOUT_S)
            # 1: the last loss is not finite, as in some of these trainings.
            if process.returncode not in (0, 1):
                last = (errors.strip().splitlines() or [""])[-1]
                raise CommandError(f"the training ended with status {process.returncode}", last)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()


def _report(chosen: Demo, specs: list[RunSpec], summaries: list[RunSummary]) -> list[Text]:
    happens = f"{chosen.happens[:1].upper()}{chosen.happens[1:]}."
    lines = [Text(line) for line in fill(happens, WIDTH).splitlines()]
    for title, spec, summary in zip(("the fault", "cured"), specs, summaries, strict=True):
        lines += [Text(), Text(f"{title}: {spec.name}", "bold")]
        lines += finding_lines(summary.findings) or [Text("no findings", "dim")]
    cure = fill(f"the cure: {chosen.cure}", WIDTH)
    return [*lines, Text(), *(Text(line) for line in cure.splitlines()), Text()]


def _result(chosen: Demo, specs: list[RunSpec], summaries: list[RunSummary]) -> dict[str, Any]:
    runs = [
        {
            "run": spec.name,
            "cured": cured,
            "step": summary.run.step,
            "loss": summary.loss_curve.last,
            "findings": [finding_object(finding) for finding in summary.findings],
        }
        for cured, spec, summary in zip((False, True), specs, summaries, strict=True)
    ]
    found = any(finding.rule == chosen.rule for finding in summaries[0].findings)
    return {**_object(chosen), "found": found, "runs": runs}


def _print_json(made: dict[str, Any]) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(made).decode() + "\n")
    sys.stdout.flush()
