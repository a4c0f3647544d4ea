"""`tui-trainer explain RULE`: what a rule tests, and what to do about its finding."""

from __future__ import annotations

from textwrap import fill
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.console import Console

from tui_trainer.cli.commands.common import flag
from tui_trainer.cli.errors import unknown
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.findings.rule import Rule
from tui_trainer.findings.rules import RULES, rules_named
from tui_trainer.learn.catalog import PAGE_OF_RULE

WIDTH = 92


def explain(
    rule: Annotated[
        str | None,
        Parameter(
            help="name of a rule, or words of its name or title (default: list all)",
            show_default=False,
        ),
    ] = None,
    *,
    json: Annotated[bool, flag("print one JSON object")] = False,
) -> int:
    """explain a rule of the findings, or list all of them"""
    if rule is None and json:
        print(msgspec.json.encode({"rules": [described(each) for each in RULES]}).decode())
        return 0
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
    if rule not in found and len(matching := rules_named(rule)) == 1:
        (rule,) = matching
    if rule not in found:
        raise unknown("rule", rule, found)
    chosen = found[rule]
    print(msgspec.json.encode(described(chosen)).decode() if json else explanation(chosen))
    return 0


def described(rule: type[Rule]) -> dict[str, Any]:
    """A rule as an object for `--json`; `next` is named as in the findings."""
    return {
        "rule": rule.name,
        "level": rule.level,
        "title": rule.title,
        "explanation": rule.explanation,
        "next": rule.advice,
        "needs": rule.needs,
        "thresholds": [
            {"name": each.name, "default": each.default, "meaning": each.meaning}
            for each in rule.thresholds
        ],
        "explained_by": rule.explained_by,
        "page": PAGE_OF_RULE.get(rule.name),
        "source": rule.source,
    }


def explanation(rule: type[Rule]) -> str:
    """The explanation of a rule, with its advice and thresholds, as text."""
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
