"""Findings among the events of a run, in the order in which they are shown. Which of them is the
effect of another is decided in `engine.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tui_trainer.protocol.events import Finding


def newest_findings(events: Iterable[object]) -> list[Finding]:
    """The findings among events, each as it was last reported: worst first, effects after their
    causes."""
    by_number: Mapping[int, Finding] = {
        event.number: event for event in events if isinstance(event, Finding)
    }
    return in_order(by_number.values())


LEVEL_ORDER = {"error": 0, "warning": 1, "info": 2}


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first, then by onset; effects follow their cause."""
    by_number = {finding.number: finding for finding in findings}

    def rank(finding: Finding) -> tuple[int, int, int]:
        return LEVEL_ORDER[finding.level], finding.onset, finding.number

    causes = [f for f in by_number.values() if f.cause is None or f.cause not in by_number]
    effects: dict[int, list[Finding]] = {}
    for finding in by_number.values():
        if finding.cause is not None and finding.cause in by_number:
            effects.setdefault(finding.cause, []).append(finding)

    def worst(finding: Finding) -> tuple[int, int, int]:
        group = [finding, *effects.get(finding.number, ())]
        return min(map(rank, group))[0], finding.onset, finding.number

    ordered: list[Finding] = []
    for finding in sorted(causes, key=worst):
        ordered.append(finding)
        ordered += sorted(effects.get(finding.number, ()), key=rank)
    return ordered


def finding_object(finding: Finding) -> dict[str, Any]:
    """A finding for JSON."""
    return {
        "number": finding.number,
        "rule": finding.rule,
        "level": finding.level,
        "onset": finding.onset,
        "where": {
            "optimizer": finding.optimizer or None,
            "parameters": list(finding.parameters),
            "phase": finding.phase or None,
        },
        "title": finding.title,
        "text": finding.text,
        "next": finding.advice,
        "confidence": finding.confidence,
        "evidence": [
            {name: getattr(each, name) for name in each.__struct_fields__}
            for each in finding.evidence
        ],
        "cause": finding.cause,
    }
