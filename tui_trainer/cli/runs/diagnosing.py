"""`tui-trainer doctor`: what is here, what is missing, and what to do about it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from rich.console import Console
from rich.text import Text

from tui_trainer.cli.errors import FAULT
from tui_trainer.cli.runs.checks import Finding, examine
from tui_trainer.cli.runs.common import RunsDir, flag

SIGNS = {
    "good": ("ok", "green"),
    "note": ("–", "dim"),
    "warning": ("!", "yellow"),
    "bad": ("✗", "red"),
}


def doctor(
    *,
    json: Annotated[bool, flag("print a list of objects instead")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """versions, device, terminal, permissions, and what is missing"""
    findings = examine(runs_dir)
    if json:
        print(msgspec.json.encode(findings).decode())
    else:
        _print(findings)
    return FAULT if any(finding.level == "bad" for finding in findings) else 0


def _print(findings: list[Finding]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(finding.name) for finding in findings)
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            console.print(Text(group, "bold"))
        sign, style = SIGNS[finding.level]
        console.print(
            Text.assemble((f"  {sign:>2} ", style), f"{finding.name:{width}}  ", finding.value)
        )
        if finding.hint:
            console.print(Text(f"     {'':{width}}  {finding.hint}", "dim"))
