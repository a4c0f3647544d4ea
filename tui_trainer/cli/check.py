"""`tui-trainer check script.py`: run some steps without a screen and print the findings."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from tui_trainer.cli.errors import FAULT
from tui_trainer.cli.options import CheckOptions, RunOptions
from tui_trainer.cli.run_setup import prepare
from tui_trainer.cli.run_text import finding_lines
from tui_trainer.cli.script import Script
from tui_trainer.findings.verdict import finding_object, newest_findings
from tui_trainer.protocol.formatting import counted
from tui_trainer.protocol.messages import Finding, Status
from tui_trainer.protocol.schema import SCRIPT
from tui_trainer.record.events import Item, RunEnded
from tui_trainer.run.output import redirect_stdout_to_stderr


class FindingsCollector:
    """A sink that keeps the findings and the final status of a run."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.end = Status()

    def take(self, items: Sequence[Item], status: Status) -> None:
        for item in items:
            if isinstance(item, Finding):
                self.findings.append(item)
            elif isinstance(item, RunEnded):
                self.end = item.status

    def close(self) -> None:
        pass


def check_script(script: Script, options: CheckOptions) -> int:
    """Run `options.steps` steps and print the findings. Returns the script's exit status if it
    fails, 1 if a finding is a warning or an error, otherwise 0. Raises CommandError."""
    script.check()
    with tempfile.TemporaryDirectory(prefix="tui-trainer-check-") as folder:
        wanted = RunOptions(
            runs_dir=Path(folder), budget=0.0, watch_nonfinite=True, rules=options.rules
        )
        spec = prepare(SCRIPT, wanted, script=script)
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
            stdout.write(_as_json(script, end, findings) + "\n")
        else:
            console = Console(file=stdout, highlight=False, soft_wrap=True)
            console.print(*_report(script, end, findings), sep="\n")
    if end.state == "crashed":
        return status or FAULT
    return FAULT if any(finding.level != "info" for finding in findings) else 0


def _as_json(script: Script, end: Status, findings: list[Finding]) -> str:
    made = {
        "script": script.title,
        "steps": end.step,
        "state": end.state,
        "reason": end.reason if end.state == "crashed" else "",
        "findings": [finding_object(finding) for finding in findings],
    }
    return msgspec.json.encode(made).decode()


def _report(script: Script, end: Status, findings: list[Finding]) -> list[Text]:
    lines = finding_lines(findings, details=True)
    steps = counted(end.step, "step")
    if not end.step:
        lines.append(Text(f"{script.title}: no optimizer step was seen"))
    elif not findings:
        lines.append(Text(f"{script.title}: no findings in {steps}"))
    else:
        causes = sum(each.cause is None for each in findings)
        lines.append(Text(f"{script.title}: {counted(causes, 'finding')} in {steps}"))
    if end.state == "crashed":
        lines.append(Text(f"it crashed: {end.reason}", "red"))
    return lines
