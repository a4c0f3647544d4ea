"""Set A: runs the planted bugs and their clean twins under `tui-trainer check`.

    python -m benchmarks.findings --set A [NAME …] [--jobs N]

A bug counts as named where a finding that is no effect of another is of the expected rule, and as
placed where its onset is the step from which the bug acts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One program; `rule` None: it is right."""

    script: str
    bug: str
    rule: str | None = None
    onset: int = 1
    within: int = 0
    """Steps by which the onset may be late."""
    steps: int = 400

    @property
    def name(self) -> str:
        return f"{self.script}:{self.bug}"


CASES = (
    Case("digits", "zero-missing", "gradients-kept", 2),
    Case("digits", "zero-between", "zeroed-before-step"),
    Case("digits", "missing-layer", "not-in-optimizer"),
    Case("digits", "head-alone", "not-in-optimizer"),
    Case("digits", "unused-layer", "never-reached"),
    Case("digits", "detached", "never-reached"),
    Case("digits", "replaced-model", "no-gradients"),
    Case("digits", "eval-mode", "eval-mode"),
    Case("digits", "frozen", "mostly-frozen"),
    Case("digits", "rate-too-high", "update-ratio-high"),
    Case("digits", "rate-too-low", "update-ratio-low"),
    Case("digits", "rate-zero", "learning-rate-zero", 151),
    Case("digits", "rate-jump", "learning-rate-jump", 201),
    Case("digits", "clip-to-nothing", "clipped-to-nothing"),
    Case("digits", "deep-sigmoid", "gradients-vanish"),
    Case("digits", "exploding", "initial-loss"),
    Case("digits", "log-of-zero", "non-finite", 166),
    Case("digits", "gradient-nan", "non-finite", 120),
    Case("digits", "bad-batch", "non-finite", 90),
    Case("digits", "softmax-twice", "softmax-before-cross-entropy"),
    Case("digits", "shuffled-labels", "no-progress"),
    Case("digits", "raw-pixels", "input-scale"),
    Case("digits", "constant-input", "constant-inputs"),
    Case("digits", "same-batch", "same-batch"),
    Case("digits", "one-label", "constant-labels"),
    Case("digits", "minus-one", "label-range"),
    Case("digits", "broadcast", "loss-broadcasts"),
    Case("digits", "bad-rows", "bad-batch", 90),
    Case("digits", "dead-relu", "dead-units"),
    Case("digits", "saturated", "saturated-units"),
    Case("digits", "constant-weights", "constant-weights"),
    Case("digits", "large-weights", "initial-scale"),
    Case("digits", "dropout-off", "dropout-off"),
    Case("digits", "backward-twice", "backward-twice"),
    Case("digits", "schedule-first", "schedule-before-step"),
    Case("digits", "schedule-per-batch", "schedule-ends-early", 91),
    Case("digits", "evaluate-in-train-mode", "train-mode-evaluation", 51),
    Case("digits", "group-at-zero", "part-not-updated", steps=150),
    Case("letters", "untied", "untied-weights", steps=150),
    Case("letters", "rate-too-high", "update-ratio-high", steps=150),
    Case("letters", "slow-input", "input-bound", within=70, steps=150),
    Case("digits", "none"),
    Case("digits", "accumulate", steps=100),
    Case("digits", "accumulate-schedule", steps=100),
    Case("digits", "binary"),
    Case("digits", "deep-tanh"),
    Case("digits", "divided-inside"),
    Case("digits", "epoch-schedule"),
    Case("digits", "full-batch"),
    Case("digits", "regression"),
    Case("digits", "clip"),
    Case("digits", "dropout"),
    Case("digits", "evaluate"),
    Case("digits", "groups", steps=150),
    Case("digits", "restarts"),
    Case("digits", "transfer"),
    Case("digits", "warm-up"),
    Case("digits", "zero-after"),
    Case("letters", "none", steps=150),
    Case("letters", "adam-warm-up", steps=150),
    Case("letters", "gan", steps=300),
    Case("letters", "slow-step", steps=150),
    Case("letters", "tied", steps=150),
)


def check(case: Case) -> tuple[list[dict], str]:
    """The findings of a program that are no effects, and what went wrong, if anything."""
    command = [sys.executable, "-P", "-m", "tui_trainer", "check", "--json"]
    command += ["--steps", str(case.steps)]
    command += [str(HERE / f"{case.script}.py"), case.bug, str(case.steps * 4)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return [], (done.stderr.strip().splitlines() or ["no answer"])[-1]
    if answer["state"] == "crashed":
        return [], answer["reason"]
    return [each for each in answer["findings"] if each["cause"] is None], ""


def verdict(case: Case, found: list[dict]) -> tuple[str, bool]:
    """(what to print, whether it is as it should be)"""
    warnings = [each for each in found if each["level"] != "info"]
    if case.rule is None:
        return ("clean", True) if not warnings else ("FALSE ALARM", False)
    rules = [each["rule"] for each in found]
    if case.rule not in rules:
        return ("missed" if not warnings else "named otherwise"), False
    onset = found[rules.index(case.rule)]["onset"]
    placed = case.onset <= onset <= case.onset + case.within
    first = "" if rules[0] == case.rule else ", not first"
    return ("named" if placed else f"named, onset not {case.onset}") + first, placed


def main(names: Sequence[str], jobs: int = 1) -> int:
    """Print a line for each case; the exit status is 1 where any is not as it should be."""
    cases = [each for each in CASES if not names or each.name in names or each.bug in names]
    good = 0
    print(f"{'program':<26} {'result':<28} findings")
    with ThreadPoolExecutor(jobs) as pool:
        for case, (found, fault, seconds) in zip(cases, pool.map(_timed, cases), strict=True):
            word, right = ("FAILED", False) if fault else verdict(case, found)
            listed = fault or "; ".join(
                f"{each['rule']} ({each['level']}) since {each['onset']}" for each in found
            )
            good += right
            print(f"{case.name:<26} {word:<28} {listed}  {seconds:.0f} s", flush=True)
    print(f"{good} of {len(cases)} as they should be")
    return 0 if good == len(cases) else 1


def _timed(case: Case) -> tuple[list[dict], str, float]:
    began = perf_counter()
    return *check(case), perf_counter() - began
