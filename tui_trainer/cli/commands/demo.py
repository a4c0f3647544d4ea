"""`tui-trainer demo NAME`: a short training with one fault, and the same without it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from tui_trainer.cli.commands import compare
from tui_trainer.cli.commands.common import RunsDir, cli_errors, flag
from tui_trainer.cli.errors import CommandError, UsageError, notify, unknown
from tui_trainer.cli.options import RunOptions
from tui_trainer.cli.run_summary import RunSummary, finding_lines, summarize_run
from tui_trainer.cli.start import demo_spec
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.cli.terminal import why_no_screen
from tui_trainer.comparison.compared_runs import ComparedRun
from tui_trainer.config.run_spec import RunSpec, read_spec
from tui_trainer.learn.demos import DEMOS, Demo, demo_texts, demo_titled, find_demo
from tui_trainer.protocol.events import Notice, finding_object
from tui_trainer.runs.launch import run_command
from tui_trainer.runs.registry import resolve

WIDTH = 92
TIMEOUT_S = 600.0
SCREENS = {"dashboard": "1", "attention": "2", "parameters": "3", "log": "5", "findings": "8"}
"""Key that opens each screen that a demo names."""


def demo(
    name: Annotated[
        str | None, Parameter(help="which one (default: list them)", show_default=False)
    ] = None,
    *,
    cured: Annotated[bool, flag("train without the fault")] = False,
    both: Annotated[
        bool, flag("train with and without it, then show both curves (default without a terminal)")
    ] = False,
    against: Annotated[
        str | None,
        Parameter(
            help="train the counterpart of RUN, a run of this demo, then show both curves",
            metavar="RUN",
            negative=(),
            show_default=False,
        ),
    ] = None,
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
    known = [each.name for each in DEMOS]
    if name not in known:
        raise unknown("demo", name, known)
    if cured and (both or against):
        option = "--both" if both else "--against"
        raise UsageError(f"{option} and --cured cannot be used together", "leave out --cured")
    chosen = find_demo(name)
    if source:
        print(chosen.script.read_text(encoding="utf-8"), end="")
        return 0
    if against is not None or both or plain or json or why_no_screen():
        return _train_both(chosen, against, runs_dir, plain, json, ascii)
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
    texts = demo_texts("en")[chosen.name]
    return {
        "name": chosen.name,
        "happens": texts.happens,
        "screen": chosen.screen,
        "rule": chosen.rule,
        "breakpoint": chosen.breakpoint,
        "cure": texts.cure,
        "set": chosen.live,
        "script": str(chosen.script),
    }


# ---------------------------------------------------------------- on the screen


def _show(chosen: Demo, cured: bool, options: RunOptions) -> int:
    """Open the screen to watch; the run pauses where the training goes wrong."""
    from tui_trainer.cli.screen import show_run

    options = replace(options, paused=not cured)
    spec = demo_spec(chosen, options, cured=cured, guided=True)
    introduced = "" if cured else chosen.name
    status = show_run(spec, options.ascii, options.slow_link, mode=chosen.screen, demo=introduced)
    if not cured:
        print(f"\nthe cure: {demo_texts('en')[chosen.name].cure}")
        print(f"  tui-trainer demo {chosen.name} --cured   trains without the fault")
        print(f"  tui-trainer demo {chosen.name} --both    shows both curves")
    return status


# ---------------------------------------------------------------- both


def _train_both(
    chosen: Demo, against: str | None, runs_dir: Path | None, plain: bool, json: bool, ascii: bool
) -> int:
    """Train with and without the fault at the same time, then compare the two. `against`: a run
    that is one of the two already."""
    options = RunOptions(plain=True, runs_dir=runs_dir)
    if against is None:
        notify(f"{chosen.name}: training with and without the fault; this takes a few seconds")
        specs = [demo_spec(chosen, options, cured=cured) for cured in (False, True)]
        _run_to_end(specs)
    else:
        specs = _with_the_other(chosen, against, options)
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


def _with_the_other(chosen: Demo, against: str, options: RunOptions) -> list[RunSpec]:
    """The run `against` and a new run of its counterpart, the one with the fault first. Raises
    CommandError."""
    with cli_errors():
        entry = resolve(against, options.runs_dir)
        spec = read_spec(entry.directory)
        events = summarize_run(entry).events
    found = demo_titled(spec.title)
    if found is None or found[0] is not chosen:
        raise UsageError(
            f"{entry.name} is not a run of this demo", f"tui-trainer demo {chosen.name} --both"
        )
    edited = any(isinstance(each, Notice) and each.kind == "edit" for each in events)
    was_cured = found[1] or edited
    words = "with the fault, to its end" if was_cured else "without the fault"
    notify(f"{chosen.name}: training {words}; this takes a few seconds")
    stem = f"{chosen.name}-uncured" if was_cured else ""
    other = demo_spec(chosen, options, cured=not was_cured, stem=stem)
    _run_to_end([other])
    return [other, spec] if was_cured else [spec, other]


def _run_to_end(specs: list[RunSpec]) -> None:
    """Train all of `specs` at once, each in its own process. Raises CommandError."""
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
    texts = demo_texts("en")[chosen.name]
    happens = f"{texts.happens[:1].upper()}{texts.happens[1:]}."
    lines = [Text(line) for line in fill(happens, WIDTH).splitlines()]
    for title, spec, summary in zip(("the fault", "cured"), specs, summaries, strict=True):
        lines += [Text(), Text(f"{title}: {spec.name}", "bold")]
        lines += finding_lines(summary.findings) or [Text("no findings", "dim")]
    cure = fill(f"the cure: {texts.cure}", WIDTH)
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
