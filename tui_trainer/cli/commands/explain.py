"""`tui-trainer explain RULE`: what a rule tests, and what to do about its finding."""

from __future__ import annotations

from textwrap import fill
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from tui_trainer.cli.errors import unknown
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.findings.rule import Rule
from tui_trainer.findings.rules import RULES
from tui_trainer.learn.catalog import PAGE_OF_RULE

WIDTH = 92


def explain(
    rule: Annotated[
        str | None, Parameter(help="name of a rule (default: list all)", show_default=False)
    ] = None,
) -> int:
    """explain a rule of the findings, or list all of them"""
    if rule is None:
        table = new_table(("RULE", "LEVEL", "WHAT IT FINDS"))
        for each in RULES:
            table.add_row(each.name, each.level, each.title)
        console = Console(highlight=False)
        for line in table_lines(table):
            console.print(line, soft_wrap=True)
        print("\ntui-trainer explain RULE explains one; --rules RULE=off switches it off")
        return 0
    found = {each.name: each for each in RULES}
    if rule not in found:
        raise unknown("rule", rule, found)
    print(explanation(found[rule]))
    return 0


def explanation(rule: type[Rule]) -> str:
    """What a rule tests and what to do about it, as text."""
    parts = [
        f"{rule.name} ({rule.level}): {rule.title}",
        _paragraph("", rule.explanation),
        _paragraph("what to do: ", rule.advice),
        _paragraph("it needs: ", rule.needs),
    ]
    parts += [
        _paragraph(f"--rules {rule.name}.{each.name}={each.default:g}: ", each.meaning)
        for each in rule.thresholds
    ]
    if rule.explained_by:
        parts.append(_paragraph("it can be an effect of: ", ", ".join(rule.explained_by)))
    if page := PAGE_OF_RULE.get(rule.name):
        parts.append(_paragraph("learn more: ", f"tui-trainer learn {page}"))
    parts.append(_paragraph("source: ", rule.source))
    return "\n\n".join(parts)


def _paragraph(label: str, text: str) -> str:
    return fill(label + text, WIDTH, initial_indent="  ", subsequent_indent="  ")
