"""`docs/findings.md`, made from the rules' own texts: python -m tui_trainer.findings.document."""

from __future__ import annotations

from pathlib import Path

from tui_trainer.findings.rule import Rule
from tui_trainer.findings.rules import RULES

PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
INTRODUCTION = """\
# Findings

<!-- Written by `python -m tui_trainer.findings.document` from the rules' own texts. -->

While a run is recorded, rules judge what is measured at every step. What they find is an event of
the run: it is shown under the header of the screens and on the screen *Findings* (`8`), stored,
replayed and exported, and included in `tui-trainer show`, `show --json`, `--json` and the report.
Each finding has a level (`error`, `warning`, `info`), an *onset* (the first step at which it held),
a location, the numbers that it is based on with their healthy ranges, and what to look at next.
Symptoms of one cause are grouped: the finding of the cause comes first, with its effects below it.

`tui-trainer check --steps 300 train.py` runs some steps of a script without a screen and prints
the findings; with `--json` as one object with `findings`, each with `rule`, `level`, `onset`,
`where`, `title`, `text`, `next`, `confidence`, `evidence` and `cause` (the `number` of the
finding that explains it). The exit status is 1 if there is a warning or an error.

A rule reports nothing until it has the data that it needs, and would rather miss something than
give a false alarm. Rules run on the recorder's thread; the only measurements made for them are
three flags that the tracer notes in passing. A rule that fails is switched off, as the log reports.

`tui-trainer explain RULE` prints a section of this page. `--rules` of `run`, `check` and the
tasks switches rules off or changes their thresholds: `--rules
over-fitting=off,loss-diverges.rise=3`; `--rules off` switches all of them off.
"""


def page() -> str:
    """The whole page."""
    table = [
        "| rule | level | what it finds |",
        "|---|---|---|",
        *(f"| [{rule.name}](#{rule.name}) | {rule.level} | {rule.title} |" for rule in RULES),
    ]
    return "\n".join([INTRODUCTION, *table, "", *map(section, RULES)])


def section(rule: type[Rule]) -> str:
    """One rule."""
    lines = [
        f"## {rule.name}",
        "",
        f"**{rule.title[:1].upper()}{rule.title[1:]}** ({rule.level}). {rule.explanation}",
        "",
        f"* What to do: {rule.next}.",
        f"* It needs {rule.needs}.",
    ]
    if rule.thresholds:
        limits = "; ".join(f"`{x.name}` {x.default:g}: {x.meaning}" for x in rule.thresholds)
        lines.append(f"* Thresholds: {limits}.")
    if rule.explained_by:
        lines.append(f"* It can be an effect of {', '.join(rule.explained_by)}.")
    lines += [f"* Source: {rule.source}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
