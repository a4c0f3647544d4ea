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

from tests.integrations.seen import compared
from tests.oracle import adapter
from tests.oracle.compare import Difference, differences
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

LOOPS = int(os.environ.get("TUI_TRAINER_ORACLE_LOOPS", "100"))
SEED = int(os.environ.get("TUI_TRAINER_ORACLE_SEED", "0"))
LOOPS_PER_TEST = 25
"""Loops of one test, so that several processes share the work."""
SHARDS = range(-(-LOOPS // LOOPS_PER_TEST))


def found_in(loop: Loop) -> list[Difference]:
    """The differences of this loop."""
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
        wrong = found_in(loop)
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
    wrong = differences(loop, truth, output)
    if wrong:
        fail(loop, wrong)


SOME = (Optimizer(layers=("b",)),)
BY_HAND = (Optimizer("data", ("b",)),)
TWO = (Optimizer("sgd", ("a", "b")), Optimizer("sgd", ("b",)))
THREE = (Optimizer("sgd", ("a",)), Optimizer("rmsprop", ("b",)), Optimizer("sgd", ("c",)))
NETS = (("a",), ("b",), ("c",))
WRONG_BEFORE = (
    Loop(
        iterations=2,
        nets=(("a", "b"), ("c",)),
        optimizers=(Optimizer("sgd", ("a", "b")), Optimizer("sgd", ("c",))),
        clips=(Clip(over="own", tight=False),),
        scaler="unscale",
        overflow_at=1,
    ),
    Loop(optimizers=(Optimizer(layers=("a",)), Optimizer(layers=("b",)))),
    Loop(size="tiny", clips=(Clip(),)),
    Loop(iterations=2, optimizers=BY_HAND, clips=(Clip("strict", tight=False),), poison_at=1),
    Loop(iterations=2, optimizers=BY_HAND, skip="after backward", skip_at=0),
    Loop(
        optimizers=(Optimizer("no_grad", ("b",)),),
        zero_by="model",
        clips=(Clip("hand", over="own", when="each"), Clip("hand", tight=False, when="each")),
    ),
    Loop(
        seed=3,
        iterations=5,
        optimizers=(Optimizer("adam", ("a",)), Optimizer("adam", ("b",))),
        zero="before backward",
        zero_by="hand",
        set_to_none=False,
        losses=2,
        clips=(Clip("strict", tight=False),),
        poison_at=2,
    ),
    Loop(iterations=2, optimizers=SOME, clips=(Clip("hand", tight=False),)),
    Loop(
        seed=2,
        iterations=5,
        optimizers=(Optimizer("rmsprop", ("a", "b")), Optimizer("sgd", ("b",))),
        zero="before backward",
        zero_by="hand",
        clips=(Clip("strict"),),
        poison_at=3,
    ),
    Loop(
        iterations=4,
        optimizers=TWO,
        rounds="alternate",
        zero="before backward",
        zero_by="data",
        clips=(Clip(when="each"), Clip(when="each")),
        added_at=2,
    ),
    Loop(
        nets=NETS,
        optimizers=THREE,
        rounds="alternate",
        zero="end",
        micro_batches=3,
        losses=2,
        clips=(Clip("data", over="own", when="each"), Clip("data", tight=False)),
        added_at=1,
        schedule=True,
    ),
    Loop(optimizers=(Optimizer("lbfgs", closure=True),), clips=(Clip("hand"), Clip("hand"))),
    Loop(
        iterations=2,
        optimizers=TWO,
        rounds="alternate",
        zero="never",
        gradients="assigned",
    ),
    Loop(
        iterations=2,
        nets=NETS,
        optimizers=tuple(Optimizer("sgd", (layer,)) for layer in "abc"),
        rounds="alternate",
        zero_by="data",
        clips=(Clip(), Clip("data", when="after")),
    ),
    Loop(optimizers=BY_HAND, idle="unused"),
    Loop(optimizers=(Optimizer("no_grad"),), idle="zeroes", clips=(Clip(),)),
    Loop(optimizers=(Optimizer("data"),), idle="other", zero="end"),
    Loop(iterations=2, perturbs=True, clips=(Clip(),)),
    Loop(iterations=2, added_at=1, added_late=True, clips=(Clip(),)),
    Loop(iterations=2, added_at=1, added_late=True, clips=(Clip("hand"),)),
    Loop(clips=(Clip("hand", when="after"), Clip("value", when="after"))),
    Loop(
        iterations=2,
        optimizers=(Optimizer("momentum", ("a",)), Optimizer("sgd", ("b",))),
        rounds="alternate",
        zero_by="data",
        gradients="assigned",
        clips=(Clip("value", tight=False), Clip("hand", tight=False, when="each")),
    ),
    Loop(
        iterations=2,
        optimizers=TWO,
        zero_by="hand",
        set_to_none=False,
        clips=(Clip("hand", over="own", tight=False),),
    ),
    Loop(
        iterations=2,
        optimizers=(Optimizer("sgd", ("a",)), Optimizer("sgd", ("b",))),
        rounds="alternate",
        zero_by="model",
        clips=(Clip("value", tight=False),),
        scaler="unscale",
    ),
    Loop(
        iterations=2,
        optimizers=(Optimizer("adam", ("a",)), Optimizer("adam", ("b",))),
        rounds="alternate",
        zero="before backward",
        zero_by="hand",
        skip="after backward",
        skip_at=0,
    ),
    Loop(scaler="unscale", clips=(Clip("data", when="each"), Clip("hand", when="each"))),
    Loop(
        iterations=4,
        nets=(("a", "b"), ("c",)),
        optimizers=(Optimizer("adam", ("a", "b")), Optimizer("rmsprop", ("c",))),
        rounds="alternate",
        clips=(Clip("strict", tight=False),),
        poison_at=2,
    ),
    Loop(iterations=4, zero_by="hand", perturbs=True),
    Loop(iterations=5, zero_by="hand", skip="after backward", skip_at=3),
    Loop(iterations=4, clips=(Clip("data", when="each"),), perturbs=True),
    Loop(iterations=2, optimizers=SOME, clips=(Clip(),), scaler="unscale"),
    Loop(
        iterations=2,
        optimizers=(Optimizer(layers=("a",)), Optimizer(layers=("b",))),
        clips=(Clip("hand", tight=False),),
        added_at=1,
        added_late=True,
    ),
    Loop(
        iterations=2,
        optimizers=(Optimizer("sgd", ("a", "b")), Optimizer("sgd", ("b",))),
        rounds="alternate",
        gradients="assigned",
        clips=(Clip("hand", tight=False),),
    ),
    Loop(
        iterations=2,
        optimizers=TWO,
        rounds="alternate",
        zero="end",
        zero_by="hand",
        clips=(Clip("hand", over="own", when="after"),),
    ),
    Loop(
        iterations=2,
        nets=(("a", "b"), ("c",)),
        optimizers=(Optimizer("sgd", ("a", "b")), Optimizer("sgd", ("b", "c"))),
        rounds="alternate",
        zero="end",
        zero_by="data",
        clips=(Clip("data", when="after"),),
    ),
)
"""One loop of each kind that was recorded wrongly once."""


@pytest.mark.parametrize("loop", WRONG_BEFORE, ids=repr)
def test_loops_that_were_wrong(loop: Loop) -> None:
    assert sensible(loop)
    if wrong := found_in(loop):
        fail(loop, wrong)
    compared("by hand" if loop.by_hand else "loop", "steps", "loss")


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
