"""Runs planted programs under tui-trainer and compares its findings with what was declared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from time import perf_counter
from typing import Any

from benchmarks.findings.causes import RULES
from benchmarks.findings.planted import HERE, Program

TIMEOUT = 900

Finding = dict[str, Any]
Runner = Callable[..., Any]
"""`subprocess.run`, or a function that behaves like it."""


@dataclass
class Answer:
    """What a program's run gave."""

    findings: list[Finding] = field(default_factory=list)
    """Each with `found`, the step at which it was first reported."""
    steps: int = 0
    seconds: float = 0.0
    fault: str = ""
    losses: list[float] = field(default_factory=list)
    """As the program printed them."""

    @property
    def warnings(self) -> list[Finding]:
        return [each for each in self.findings if each["level"] != "info"]


def run(program: Program, runner: Runner = subprocess.run) -> Answer:
    """Run a program to the end of its steps."""
    arguments = program.arguments
    command = [sys.executable, "-P", "-m", "tui_trainer"]
    script = str(HERE / program.script)
    checked = program.ranks == 1
    with tempfile.TemporaryDirectory(prefix="findings-") as folder:
        if checked:
            options = ["--json", "--steps", str(program.steps)]
            command += ["check"]
            command += [program.task, *options] if program.task else [*options, script]
            command += arguments
        else:
            command += ["run", "--json", "--runs-dir", folder, "--nproc", str(program.ranks)]
            command += [script, *arguments]
        began = perf_counter()
        try:
            done = runner(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                timeout=TIMEOUT,
                env=_environment(),
            )
        except subprocess.TimeoutExpired:
            return Answer(fault=f"not finished after {TIMEOUT} s")
    answer = _checked(done.stdout) if checked else _recorded(done.stdout)
    answer.seconds = perf_counter() - began
    answer.losses = [float(each) for each in re.findall(r"step \d+ loss (\S+)", done.stderr)]
    if not answer.fault and not answer.steps:
        answer.fault = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    return answer


def _environment() -> Mapping[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _checked(output: str) -> Answer:
    try:
        read = json.loads(output)
    except ValueError:
        return Answer()
    return Answer(read["findings"], read["steps"], fault=read["reason"])


def _recorded(output: str) -> Answer:
    """What the lines of `--json` say."""
    answer = Answer()
    newest: dict[int, Finding] = {}
    for line in output.splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if read.get("type") == "event" and read.get("kind") == "finding":
            before = newest.get(read["number"], read)
            newest[read["number"]] = {**read, "found": before.get("found", read["step"])}
        if read.get("type") == "end" and read["reason"] != "finished":
            answer.fault = read["message"] or read["reason"]
        if isinstance(read.get("step"), int):
            answer.steps = max(answer.steps, read["step"])
    answer.findings = list(newest.values())
    return answer


@dataclass(frozen=True)
class Verdict:
    """How the findings of a program compare with its fault."""

    detected: bool
    """There is a warning or an error, or a hint (`info`) that names the cause, and it is not older
    than the fault."""
    late: int | None
    """Steps from the trigger to the first such finding."""
    named: bool
    """One that is not the effect of another names the cause."""
    exact: bool
    """One that names the cause begins at the step from which the fault acts, or by `until`."""
    placed: bool
    """One names the parameter, module, rank or phase."""


def judge(program: Program, answer: Answer) -> Verdict:
    """Compare the findings with what is declared."""
    causes = (program.cause, *program.also) if program.cause else ()
    rules = {rule for cause in causes for rule in RULES[cause]}
    last = max(program.trigger, program.until)
    after = [
        each
        for each in answer.findings
        if each["onset"] >= program.trigger and (each["level"] != "info" or each["rule"] in rules)
    ]
    steps = [each["found"] - program.trigger for each in after]
    naming = [each for each in after if each["cause"] is None and each["rule"] in rules]
    return Verdict(
        detected=bool(after),
        late=min(steps, default=None),
        named=bool(naming),
        exact=any(program.trigger <= each["onset"] <= last for each in naming),
        placed=any(_is_at(each, place) for each in after for place in program.places),
    )


def _is_at(finding: Finding, place: str) -> bool:
    where = finding["where"]
    named = [where["phase"] or "", *where["parameters"]]
    named += re.findall(r"rank \d+", finding["text"])
    return any(fnmatchcase(each, place) or fnmatchcase(each, f"*.{place}") for each in named)
