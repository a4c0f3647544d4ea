"""A sample of the programs of `python -m benchmarks.findings`, and what its judge makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.findings.causes import RULES as NAMED_BY
from benchmarks.findings.judge import Answer, judge, run
from benchmarks.findings.planted import HERE, SET_B, SET_C, SET_D, SET_E, Program
from tests import processes
from tui_trainer.findings.rules import RULES

BY_NAME = {each.name: each for each in (*SET_B, *SET_C, *SET_D, *SET_E)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["zero_grad_missing", "wrong_initialisation", "mlp missing_softmax", "mlp high_rate"]
)
def test_fault_is_named_and_its_twin_is_clean(name: str) -> None:
    program = replace(BY_NAME[name], steps=25)
    verdict = judge(program, run(program, processes.run))
    assert verdict.detected
    assert verdict.named
    assert verdict.placed
    twin = replace(program, cause=None, arguments=program.clean_arguments)
    answer = run(twin, processes.run)
    assert not answer.fault
    assert answer.steps == 25
    assert not answer.warnings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regression", "lora", "wasserstein_gan"])
def test_clean_program_has_no_warning(name: str) -> None:
    answer = run(replace(BY_NAME[name], steps=60), processes.run)
    assert not answer.fault
    assert answer.steps == 60
    assert not answer.warnings, answer.warnings


def test_declarations_are_complete() -> None:
    assert len(BY_NAME) == len(SET_B) + len(SET_C) + len(SET_D) + len(SET_E)
    for program in BY_NAME.values():
        assert program.task or (HERE / program.script).is_file()
        assert program.cause is None or (program.cause in NAMED_BY and program.places)
    named = {rule for rules in NAMED_BY.values() for rule in rules}
    assert named <= {rule.name for rule in RULES}
    scripts = {path.stem for path in (HERE / "silent").glob("*.py")}
    assert scripts == {Path(each.script).stem for each in SET_B}


def finding(**changed: object) -> dict[str, object]:
    known = {"rule": "gradients-kept", "level": "error", "onset": 5, "found": 6, "cause": None}
    where = {"phase": "backward", "parameters": ["net.0.weight"], "optimizer": None}
    return {**known, "text": "rank 1 differs", "where": where, **changed}


def test_findings_older_than_the_fault_do_not_count() -> None:
    program = Program(
        "one", "", cause="gradients of earlier steps are kept", trigger=5, places=("net.*",)
    )
    found = judge(program, Answer([finding()]))
    assert (found.detected, found.late, found.named, found.placed) == (True, 1, True, True)
    older = judge(program, Answer([finding(onset=4)]))
    assert (older.detected, older.late, older.named, older.placed) == (False, None, False, False)
    other = judge(program, Answer([finding(rule="no-progress")]))
    assert (other.detected, other.named) == (True, False)
    hint = judge(program, Answer([finding(rule="no-progress", level="info")]))
    assert not hint.detected
    effect = judge(program, Answer([finding(cause=3)]))
    assert not effect.named
    ranked = judge(replace(program, places=("rank *",)), Answer([finding()]))
    assert ranked.placed
