"""Generated training loops: every number written about them is correct, or absent.

The same 100 loops are drawn each time. `make oracle LOOPS=2000` draws more; SEED=… draws others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.integrations.seen import SEEN
from tests.oracle import adapter
from tests.oracle.compare import CHECKS, Difference, differences
from tests.oracle.generator import (
    Clip,
    Loop,
    Optimizer,
    loops,
    script_of,
    sensible,
    silent,
    standalone,
)
from tests.oracle.known_gaps import KNOWN_GAPS, Gap

LOOPS = int(os.environ.get("TUI_TRAINER_ORACLE_LOOPS", "100"))
SEED = int(os.environ.get("TUI_TRAINER_ORACLE_SEED", "0"))
LOOPS_PER_TEST = 25
"""Loops of one test, so that several processes share the work."""
SHARDS = range(-(-LOOPS // LOOPS_PER_TEST))


def found_in(loop: Loop) -> list[Difference]:
    """The differences of this loop, including known gaps."""
    script = script_of(loop)
    truth, alone = adapter.run_alone(script)
    with tempfile.TemporaryDirectory() as folder:
        output, traced = adapter.run_traced(script, Path(folder), loop.measured_every)
    assert alone.keys() == traced.keys()
    for name, weights in alone.items():
        assert _bits(weights) == _bits(traced[name]), f"{name} differs with the tracer"
    return differences(loop, truth, output)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def unknown(loop: Loop, found: list[Difference]) -> list[Difference]:
    """The differences that no known gap explains."""
    known = {check for gap in KNOWN_GAPS if gap.shows_in(loop) for check in gap.checks}
    return [difference for difference in found if difference.check not in known]


def fail(loop: Loop, found: list[Difference]) -> None:
    """Fail with the differences and a program that reproduces them."""
    text = "\n".join(map(str, found))
    program = Path(tempfile.gettempdir()) / "tui-trainer-oracle.py"
    program.write_text(standalone(loop, text), encoding="utf-8")
    pytest.fail(f"{text}\n\n{loop}\n\n{script_of(loop)}\nThe whole program is {program}.")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("shard", SHARDS)
def test_generated_loops(shard: int) -> None:
    @seed(SEED + shard)
    @settings(
        max_examples=min(LOOPS_PER_TEST, LOOPS - shard * LOOPS_PER_TEST),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(loops().filter(sensible))
    def check(loop: Loop) -> None:
        wrong = unknown(loop, found_in(loop))
        if wrong:
            fail(loop, wrong)

    check()


@pytest.mark.parametrize(
    "loop",
    [
        Loop(optimizers=(Optimizer("adam"),), micro_batches=2, clips=(Clip(),), schedule=True),
        Loop(
            nets=(("a", "b"), ("c",)),
            optimizers=(Optimizer("momentum", ("a", "b")), Optimizer("adam", ("c",))),
            rounds="alternate",
            clips=(Clip(over="own"), Clip("value", over="own")),
            evaluates=True,
        ),
    ],
    ids=["one optimizer", "two optimizers"],
)
def test_through_the_command_line(loop: Loop, tmp_path: Path) -> None:
    truth, _ = adapter.run_alone(script_of(loop))
    output = adapter.run_command(silent(loop), tmp_path)
    wrong = unknown(loop, differences(loop, truth, output))
    if wrong:
        fail(loop, wrong)
    assert "loss" in SEEN["loop"][1] & SEEN["by hand"][1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("gap", KNOWN_GAPS, ids=lambda gap: gap.name)
def test_known_gaps_are_still_there(gap: Gap) -> None:
    found: set[str] = set()
    for loop in gap.examples:
        assert sensible(loop)
        assert gap.shows_in(loop)
        found |= {difference.check for difference in found_in(loop)}
    assert set(gap.checks) <= CHECKS.keys()
    mended = set(gap.checks) - found
    assert not mended, f"{sorted(mended)} find nothing: take them off the gap {gap.name!r}"


# ---------------------------------------------------------------- the oracle itself

PLAIN = Loop(optimizers=(Optimizer("adam"),), micro_batches=2, clips=(Clip(),), evaluates=True)


def test_a_script_runs_by_itself_and_tells_its_truth() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(standalone(PLAIN, "a remark"), "loop.py", "exec"), {"__name__": "__main__"})
    assert printed.getvalue().count("Step(") == PLAIN.iterations


def test_a_loop_is_data() -> None:
    assert eval(repr(PLAIN)) == PLAIN
    assert dataclasses.replace(PLAIN) == PLAIN


def test_every_number_is_looked_at(tmp_path: Path) -> None:
    """A number that is a little off is found wherever it stands."""
    script = script_of(PLAIN)
    truth, _ = adapter.run_alone(script)
    output, _ = adapter.run_traced(script, tmp_path)
    before = set(map(str, differences(PLAIN, truth, output)))
    steps = [line for line in output.live if line["type"] == "step"]
    places = [(step, name) for step in steps for name in ("loss", "lr", "grad_norm_preclip")]
    for table in ("grad_norm", "weight_norm", "update_ratio"):
        places += [(step[table], name) for step in steps for name in step[table]]
    places += [
        (step["clip"], name)
        for step in steps
        for name in ("max_norm", "norm_before", "norm_after", "scale")
    ]
    places += [(each, "share") for step in steps for each in step["clip"]["dominant"][:2]]
    places += [(output.show, name) for name in ("loss", "grad_norm_preclip", "learning_rate")]
    assert len(places) > 60
    for place, name in places:
        right = place[name]
        for wrong in (right * 1.01, None):
            place[name] = wrong
            after = set(map(str, differences(PLAIN, truth, output)))
            assert after - before, f"{name} is not looked at"
        place[name] = right
