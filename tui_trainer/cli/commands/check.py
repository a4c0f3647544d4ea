"""`tui-trainer check`: run some steps of a script or a task without a screen, and print the
findings."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from tui_trainer.cli.errors import FAULT
from tui_trainer.cli.options import CheckOptions, RunOptions
from tui_trainer.cli.run_setup import prepare
from tui_trainer.cli.run_summary import finding_lines
from tui_trainer.cli.script import Script
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.config.training import resolve, to_flat
from tui_trainer.protocol.events import Finding, Notice, finding_object, newest_findings
from tui_trainer.protocol.formatting import counted
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import SCRIPT, Scalar
from tui_trainer.record.sink_items import Item, RunEnded
from tui_trainer.run.output import redirect_stdout_to_stderr
from tui_trainer.tasks.definition import TaskDefinition


class FindingsCollector:
    """A sink that keeps the findings and the final status of a run."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.found: dict[int, int] = {}
        """The step at which each finding was first reported, by number."""
        self.faults: list[str] = []
        """Internal faults, because of which something was not measured or checked."""
        self.end = Status()

    def take(self, items: Sequence[Item], status: Status) -> None:
        for item in items:
            if isinstance(item, Finding):
                self.findings.append(item)
                self.found.setdefault(item.number, item.step)
            elif isinstance(item, Notice) and item.kind == "fault":
                self.faults.append(item.text)
            elif isinstance(item, RunEnded):
                self.end = item.status

    def close(self) -> None:
        pass


def check_script(script: Script, options: CheckOptions) -> int:
    """Run `options.steps` steps and print the findings. Returns the script's exit status if it
    fails, 1 if a finding is a warning or an error, otherwise 0. Raises CommandError."""
    script.check()

    def spec_in(wanted: RunOptions) -> RunSpec:
        return prepare(SCRIPT, wanted, script=script)

    return _check(script.title, options, spec_in)


def check_task(
    task: TaskDefinition, preset: str | None, overrides: dict[str, Scalar], options: CheckOptions
) -> int:
    """Check a task as `check_script` checks a script. Schedules are those of a whole training.
    Raises ConfigurationError and CommandError."""
    configuration = to_flat(resolve(task, preset, overrides))

    def spec_in(wanted: RunOptions) -> RunSpec:
        return prepare(task.name, wanted, configuration)

    return _check(task.name, options, spec_in)


def _check(title: str, options: CheckOptions, spec_in: Callable[[RunOptions], RunSpec]) -> int:
    with tempfile.TemporaryDirectory(prefix="tui-trainer-check-") as folder:
        spec = spec_in(RunOptions(runs_dir=Path(folder), budget=0.0, rules=options.rules))
        stdout = os.fdopen(redirect_stdout_to_stderr(), "w", encoding="utf-8")
        from tui_trainer.run.host import Host, run_to_end

        collector = FindingsCollector()
        host = Host(spec)
        host.gate.call_every((options.steps,), lambda step: host.gate.stop())
        status = run_to_end(host, collector)
    end = collector.end
    findings = newest_findings(collector.findings)
    with stdout:
        if options.json:
            stdout.write(_as_json(title, findings, collector) + "\n")
        else:
            console = Console(file=stdout, highlight=False, soft_wrap=True)
            console.print(*_report(title, findings, collector), sep="\n")
    if end.state == "crashed":
        return status or FAULT
    return FAULT if any(finding.level != "info" for finding in findings) else 0


def _as_json(title: str, findings: list[Finding], collector: FindingsCollector) -> str:
    end, found = collector.end, collector.found
    made = {
        "script": title,
        "steps": end.step,
        "state": end.state,
        "reason": end.reason if end.state == "crashed" else "",
        "findings": [
            {**finding_object(finding), "found": found[finding.number]} for finding in findings
        ],
        "faults": collector.faults,
    }
    return msgspec.json.encode(made).decode()


def _report(title: str, findings: list[Finding], collector: FindingsCollector) -> list[Text]:
    end = collector.end
    lines = finding_lines(findings, details=True)
    steps = counted(end.step, "step")
    if not end.step:
        lines.append(Text(f"{title}: no optimizer step was seen"))
    elif not findings:
        lines.append(Text(f"{title}: no findings in {steps}"))
    else:
        causes = sum(each.cause is None for each in findings)
        lines.append(Text(f"{title}: {counted(causes, 'finding')} in {steps}"))
    lines += [Text(f"not everything was checked: {fault}", "yellow") for fault in collector.faults]
    if end.state == "crashed":
        lines.append(Text(f"it crashed: {end.reason}", "red"))
    return lines
