"""What docs/tutorial.md says of its script, in its first steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.inspector.test_inspector import Traced
from tui_trainer.inspector.inspector import Inspector
from tui_trainer.protocol.inspection import DescribeUse, ExplainUpdate, UpdateExplanation

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = (DOCS / "examples" / "reverse.py").read_text()
STEPS = 24


def trained(source: str, look) -> float:
    """The last loss of the first steps of the script."""
    assert ", 64, 600\n" in source
    short = compile(source.replace(", 64, 600\n", f", 64, {STEPS}\n"), "reverse.py", "exec")
    names: dict[str, object] = {"__name__": "__main__"}
    Traced(look).run(lambda: exec(short, names))
    return float(names["loss"].detach())


def test_the_decay_takes_thirty_percent_of_the_decoder_in_every_step():
    explained: list[UpdateExplanation] = []
    groups = []

    def look(inspector: Inspector, phase: str, step: int) -> None:
        if (phase == "backward" and step == STEPS - 1) or (phase == "step" and step == STEPS):
            explained.append(inspector.answer(ExplainUpdate("decoder.key.weight", (3, 17))))
            groups[:] = inspector.answer(DescribeUse()).groups

    wrong = trained(SCRIPT, look)
    assert [group.settings["weight_decay"] for group in groups] == [0.01, 100.0]
    after = explained[-1]
    assert after.settings["lr"] == 0.003
    decayed = next(term for term in after.terms if "decoupled decay" in term.formula)
    assert decayed.numbers.startswith("0.7·")
    assert decayed.value == pytest.approx(0.7 * after.old)
    assert after.difference <= 4 * after.precision

    mended = SCRIPT.replace('"weight_decay": 1e2', '"weight_decay": 1e-2')
    assert mended != SCRIPT
    right = trained(mended, lambda *seen: None)
    assert wrong > 2.15
    assert right < wrong - 0.05


def test_the_pictures_of_the_tutorial_are_there():
    text = (DOCS / "tutorial.md").read_text()
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line[:2] == "!["]
    assert len(pictures) == 6
    assert all((DOCS / picture).exists() for picture in pictures)
