"""Runs sets of planted programs and their clean twins and prints a table of each.

    python -m benchmarks.findings [--set A|A2|B|B2|C|C2|D|D2|E] [NAME …] [--jobs N] [--json FILE]

Without `--set`, all of them. A2 to D2 are the halves that were written after the rules
(`held_out/`). Set A, the faults that the rules were written for, has a judge of its own,
`benchmarks/findings/planted_kinds.py`, and writes nothing to FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.findings.held_out.declarations import HELD_OUT
from benchmarks.findings.judge import Answer, Verdict, judge, run
from benchmarks.findings.planted import SETS as FIRST_HALVES
from benchmarks.findings.planted import Program
from benchmarks.findings.planted_kinds import main as run_planted_kinds

SETS = {**FIRST_HALVES, **HELD_OUT}
GOALS = {
    "A2": "goal: all named, with the exact onset",
    "B": "goal: 10 of 11 within one step of the trigger",
    "C": "goal: 90 % detected in 100 steps, 60 % with the cause named, 65 % placed",
    "E": "no goal: programs that the rules have not seen",
    "D": "goal: at most one false warning in 20 programs, and no false error",
}


def _twins(programs: Sequence[Program]) -> list[Program]:
    """The clean twins, each once: most faults of a kind of model share theirs."""
    found: dict[tuple[str, ...], Program] = {}
    for program in programs:
        twin = replace(program, cause=None, places=(), arguments=program.clean_arguments)
        found.setdefault((twin.script, *twin.arguments), twin)
    return [replace(each, name=f"{each.name} (clean)") for each in found.values()]


def _listed(answer: Answer) -> str:
    if answer.fault:
        return answer.fault
    return "; ".join(
        f"{each['rule']} ({each['level']}) since {each['onset']}, found at {each['found']}"
        + ("" if each["cause"] is None else ", an effect")
        for each in answer.findings
    )


def _line(program: Program, answer: Answer, verdict: Verdict) -> str:
    if answer.fault:
        words = "FAILED"
    elif program.cause is None:
        words = "FALSE ALARM" if answer.warnings else "clean"
    elif not verdict.detected:
        words = "missed"
    else:
        words = f"after {verdict.late}" + (", named" if verdict.named else "")
        words += ", placed" if verdict.placed else ""
        words += "" if verdict.exact or not verdict.named else ", other onset"
    return f"{program.name:<32} {words:<26} {_listed(answer)}  {answer.seconds:.0f} s"


def _summary(which: str, judged: Sequence[tuple[Program, Answer, Verdict]]) -> str:
    faults = [each for each in judged if each[0].cause is not None]
    right = [each for each in judged if each[0].cause is None]
    lines = []
    if faults:
        total = len(faults)
        detected = sum(verdict.detected for _, _, verdict in faults)
        named = sum(verdict.named for _, _, verdict in faults)
        placed = sum(verdict.placed for _, _, verdict in faults)
        exact = sum(verdict.exact for _, _, verdict in faults)
        soon = sum(verdict.late is not None and verdict.late <= 1 for _, _, verdict in faults)
        lines.append(
            f"{total} faults: {detected} detected ({detected / total:.0%}), {soon} of them within "
            f"one step; {named} named ({named / total:.0%}), {exact} of them with the exact onset; "
            f"{placed} placed ({placed / total:.0%})"
        )
    if right:
        warned = [answer.warnings for _, answer, _ in right]
        errors = sum(any(each["level"] == "error" for each in found) for found in warned)
        lines.append(
            f"{len(right)} clean programs: {sum(map(bool, warned))} with a false warning, "
            f"{errors} of them an error"
        )
    return "\n".join([*lines, GOALS[which] if which in GOALS else GOALS[which[0]]])


def _run_set(which: str, options: argparse.Namespace) -> list[tuple[Program, Answer, Verdict]]:
    """Run the programs of a set, and print a line for each and their numbers."""
    programs = [
        each
        for each in SETS[which]
        if not options.names or any(name in each.name for name in options.names)
    ]
    if which[0] != "D" and not options.no_twins:
        programs += _twins(programs)
    judged = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for program, answer in zip(programs, pool.map(run, programs), strict=True):
            verdict = judge(program, answer)
            judged.append((program, answer, verdict))
            print(_line(program, answer, verdict), flush=True)
    print(_summary(which, judged))
    return judged


def main(arguments: Sequence[str]) -> int:
    """Print a line per program; the exit status is 1 if one failed to run, or one of set A was not
    named as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.findings")
    parser.add_argument("--set", choices=["A", *sorted(SETS)], dest="which")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-twins", action="store_true", help="only the programs with a fault")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args(arguments)
    wanted = [options.which] if options.which else ["A", *sorted(SETS)]
    status = 0
    rows: list[dict[str, object]] = []
    for which in wanted:
        print(f"set {which}")
        if which == "A":
            status |= run_planted_kinds(options.names, options.jobs)
        else:
            judged = _run_set(which, options)
            status |= any(answer.fault for _, answer, _ in judged)
            rows += [
                {
                    "set": which,
                    "program": asdict(program),
                    "answer": asdict(answer),
                    "verdict": asdict(verdict),
                }
                for program, answer, verdict in judged
            ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
