"""A sample of the programs of `python -m benchmarks.findings`, and what its judge makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.findings.causes import RULES as NAMED_BY
from benchmarks.findings.held_out.declarations import HELD_OUT
from benchmarks.findings.judge import Answer, judge, run
from benchmarks.findings.planted import HERE, SET_B, SET_C, SET_D, SET_E, SETS, Program
from tests import processes
from tui_trainer.findings.rules import RULES

BY_NAME = {each.name: each for each in (*SET_B, *SET_C, *SET_D, *SET_E)}
BY_NAME_HELD_OUT = {each.name: each for programs in HELD_OUT.values() for each in programs}


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
def test_fault_of_a_set_written_after_the_rules_is_named() -> None:
    program = BY_NAME_HELD_OUT["backbone_left_out"]
    verdict = judge(program, run(replace(program, steps=20), processes.run))
    assert (verdict.named, verdict.exact, verdict.placed, verdict.late) == (True, True, True, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regression", "lora", "wasserstein_gan"])
def test_clean_program_has_no_warning(name: str) -> None:
    answer = run(replace(BY_NAME[name], steps=60), processes.run)
    assert not answer.fault
    assert answer.steps == 60
    assert not answer.warnings, answer.warnings


def test_declarations_are_complete() -> None:
    assert len(BY_NAME) == len(SET_B) + len(SET_C) + len(SET_D) + len(SET_E)
    every = [each for programs in {**SETS, **HELD_OUT}.values() for each in programs]
    for program in every:
        assert program.task or (HERE / program.script).is_file()
        assert program.cause is None or (program.cause in NAMED_BY and program.places)
        assert set(program.also) <= set(NAMED_BY)
    named = {rule for rules in NAMED_BY.values() for rule in rules}
    assert named <= {rule.name for rule in RULES}
    scripts = {path.stem for path in (HERE / "silent").glob("*.py")}
    assert scripts == {Path(each.script).stem for each in SET_B}
    held_out = {path.relative_to(HERE).as_posix() for path in (HERE / "held_out").rglob("*.py")}
    declared = {each.script for programs in HELD_OUT.values() for each in programs}
    assert held_out - {"held_out/declarations.py"} == declared


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


def test_onsets_and_causes_that_are_as_right_count() -> None:
    program = Program(
        "one",
        "",
        cause="dropout is off",
        also=("gradients of earlier steps are kept",),
        trigger=2,
        until=5,
        places=("net.*",),
    )
    found = judge(program, Answer([finding()]))
    assert (found.named, found.exact) == (True, True)
    late = judge(replace(program, until=4), Answer([finding()]))
    assert (late.named, late.exact) == (True, False)
    other = judge(replace(program, also=()), Answer([finding()]))
    assert (other.detected, other.named, other.exact) == (True, False, False)
