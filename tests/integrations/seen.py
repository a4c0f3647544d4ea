"""What the tests compare with the numbers of each framework, as the table of docs/scripts.md.

A test calls `compared` with what it has compared. `marks.json` holds what each test compared when
it ran last with TUI_TRAINER_UPDATE_MARKS=1; any other run fails where that is not the same.
`python -m tests.integrations.seen` writes the table into the document:

    TUI_TRAINER_UPDATE_MARKS=1 python -m pytest -n 0 tests/integrations tests/oracle \\
        tests/run/test_progress.py tests/run/test_ranks.py && python -m tests.integrations.seen
"""

from __future__ import annotations

import json
import os
from pathlib import Path

QUANTITIES = {
    "steps": "steps and weights",
    "loss": "loss, clipping",
    "total": "total steps",
    "epoch": "epochs",
    "items": "samples a step",
    "evaluation": "evaluations",
    "logged": "logged values",
    "attention": "attention",
    "ranks": "several processes",
}
"""Quantities, and their titles."""
LENGTH = {"steps", "total", "epoch", "items"}
TITLES = {
    "transformers": "Hugging Face `Trainer`",
    "accelerate": "accelerate",
    "lightning": "Lightning",
    "peft": "PEFT: LoRA, DoRA",
    "ddp": "`DistributedDataParallel`",
    "fsdp2": "FSDP2: `fully_shard`",
    "loop": "a plain loop",
    "by hand": "a loop without an optimizer",
}
MARKS = Path(__file__).with_name("marks.json")
DOCUMENT = Path(__file__).parents[2] / "docs" / "scripts.md"


def marks() -> dict[str, dict[str, list[str]]]:
    """Framework → test → quantities that it compares."""
    return json.loads(MARKS.read_text(encoding="utf-8"))


def compared(framework: str, *quantities: str) -> None:
    """The test that calls this has compared these quantities of a framework."""
    test = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0].partition("[")[0]
    found = marks()
    known = found.setdefault(framework, {})
    if "TUI_TRAINER_UPDATE_MARKS" in os.environ:
        known[test] = sorted(quantities)
        MARKS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert known.get(test) == sorted(quantities), "TUI_TRAINER_UPDATE_MARKS=1 writes what it is"


def table() -> str:
    found = marks()
    lines = ["| | " + " | ".join(QUANTITIES.values()) + " |", "|---" * (len(QUANTITIES) + 1) + "|"]
    for framework, title in TITLES.items():
        seen = {name for each in found.get(framework, {}).values() for name in each}
        cells = ("✓" if name in seen else "" for name in QUANTITIES)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    begin = text.index("| | " + next(iter(QUANTITIES.values())))
    end = text.index("\n\n", begin) + 1
    DOCUMENT.write_text(text[:begin] + table() + text[end:], encoding="utf-8")
