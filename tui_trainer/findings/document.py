"""`docs/findings.md`, made from the rules' own texts: python -m tui_trainer.findings.document."""

from __future__ import annotations

from pathlib import Path

from tui_trainer.findings.rule import Rule
from tui_trainer.findings.rules import RULES

PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
INTRODUCTION = """\
# Findings

<!-- Written by `python -m tui_trainer.findings.document` from the rules' own texts. -->

While a run is watched, rules judge what is measured at every step. What they find is an event of
the run: it is shown under the header of the screens and on the screen *Findings* (`8`), stored,
replayed and exported, and part of `tui-trainer show`, `show --json`, `--json` and the report.
Each finding has a level (`error`, `warning`, `info`), the *onset* (the first step at which it was
so), where it is, the numbers that it rests on beside the band in which they are healthy, and what
to look at next. Symptoms of one cause are joined: the finding of the cause comes first, and its
effects stand below it.

`tui-trainer check --steps 300 train.py` runs some steps of a script without a screen and prints
the findings; with `--json` as one object with `findings`, each with `rule`, `level`, `onset`,
`where`, `title`, `text`, `next`, `confidence`, `evidence` and `cause` (the `number` of the
finding that explains it). The exit status is 1 where there is a warning or worse.

A rule says nothing before it has what it needs, and rather misses something than gives a false
alarm. Rules run on the recorder's thread; they need no measurement of their own but three bits
that the tracer notes in passing. A rule that fails is switched off, and the log says so.

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
