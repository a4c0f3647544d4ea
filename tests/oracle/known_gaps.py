"""What the tracer is known to get wrong: differences that do not fail a test, until they are gone.

Each gap says in which loops it shows and which checks find it there; every other check holds in
these loops as well. Where the examples of a gap show nothing any more the test fails: the gap is
to be taken off this list, or the check off its gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.oracle.generator import Clip, Loop, Optimizer, shares_parameters


@dataclass(frozen=True)
class Gap:
    """One thing that is wrong."""

    name: str
    why: str
    """What is wrong, in a sentence."""
    shows_in: Callable[[Loop], bool]
    checks: tuple[str, ...]
    examples: tuple[Loop, ...]
    """Loops in which, taken together, every one of the checks finds it."""


# ---------------------------------------------------------------- where they show


def has_several(loop: Loop) -> bool:
    return len(loop.optimizers) > 1 or loop.sparse


def has_outside(loop: Loop) -> bool:
    """Whether some parameters are in no optimizer."""
    held = {layer for optimizer in loop.optimizers for layer in optimizer.layers}
    return len(held) < len(loop.layers) or loop.replaced_at is not None


def clips_kind(loop: Loop, *kinds: str) -> bool:
    return any(clip.kind in kinds for clip in loop.clips)


KNOWN_GAPS: tuple[Gap, ...] = (
    Gap(
        "updates by hand",
        "All parameters with a gradient are taken for those that the script updates, and what it "
        "did to gradients is not seen where they are gone when the next phase begins.",
        lambda loop: (
            loop.by_hand
            and (set(loop.optimizers[0].layers) != set(loop.layers) or clips_kind(loop, "hand"))
        ),
        ("total_norms", "clips", "shown", "losses", "skipped_iterations"),
        (
            Loop(
                iterations=2,
                optimizers=(Optimizer(kind="data", layers=("b",)),),
                clips=(Clip("strict", tight=False),),
                poison_at=1,
            ),
            Loop(
                iterations=2,
                optimizers=(Optimizer(kind="data", layers=("b",)),),
                skip="after backward",
                skip_at=0,
            ),
            Loop(
                optimizers=(Optimizer(kind="no_grad", layers=("b",)),),
                zero_by="model",
                clips=(
                    Clip("hand", over="own", when="each"),
                    Clip("hand", tight=False, when="each"),
                ),
            ),
        ),
    ),
    Gap(
        "gradients that are thrown away after the next forward",
        "The skip is noticed at the next backward, and that forward is counted in it.",
        lambda loop: (
            loop.zero == "before backward"
            and (loop.skip.startswith("after") or clips_kind(loop, "strict"))
        ),
        ("forwards",),
        (
            Loop(
                seed=3,
                iterations=5,
                optimizers=(
                    Optimizer(kind="adam", layers=("a",)),
                    Optimizer(kind="adam", layers=("b",)),
                ),
                zero="before backward",
                zero_by="hand",
                set_to_none=False,
                losses=2,
                clips=(Clip("strict", tight=False),),
                poison_at=2,
            ),
        ),
    ),
    Gap(
        "clipping by hand of parameters in no optimizer",
        "Changes by hand are looked for in the optimizer's own gradients alone.",
        lambda loop: has_outside(loop) and clips_kind(loop, "hand"),
        ("clips",),
        (
            Loop(
                iterations=2,
                optimizers=(Optimizer(layers=("b",)),),
                clips=(Clip("hand", tight=False),),
            ),
        ),
    ),
    Gap(
        "an iteration thrown away between optimizers that share parameters",
        "Its norms are missing where the other optimizer has read the gradients.",
        shares_parameters,
        ("skipped_iterations",),
        (
            Loop(
                seed=2,
                iterations=5,
                optimizers=(
                    Optimizer("rmsprop", ("a", "b")),
                    Optimizer("sgd", ("b",)),
                ),
                zero="before backward",
                zero_by="hand",
                clips=(Clip("strict"),),
                poison_at=3,
            ),
        ),
    ),
    Gap(
        "zeroing through .data beside several optimizers in turn",
        "It leaves no mark on gradients that a clipping has changed after their step.",
        lambda loop: has_several(loop) and loop.rounds == "alternate" and loop.zero_by == "data",
        ("clips", "losses"),
        (
            Loop(
                iterations=4,
                optimizers=(Optimizer("sgd", ("a", "b")), Optimizer("sgd", ("b",))),
                rounds="alternate",
                zero="before backward",
                zero_by="data",
                clips=(Clip(when="each"), Clip(when="each")),
                added_at=2,
            ),
            Loop(
                seed=3,
                optimizers=(Optimizer("sgd", ("a",)), Optimizer("sgd", ("b",))),
                rounds="alternate",
                zero="end",
                zero_by="data",
                micro_batches=2,
                losses=2,
                gradients="autograd",
                clips=(Clip(when="after"), Clip("infinity", over="own", tight=False)),
                poison_at=2,
            ),
        ),
    ),
    Gap(
        "clipping through .data beside several optimizers",
        "It leaves no mark, and the norms of another optimizer's gradients are not compared.",
        lambda loop: has_several(loop) and clips_kind(loop, "data"),
        ("clips",),
        (
            Loop(
                nets=(("a",), ("b",), ("c",)),
                optimizers=(
                    Optimizer("sgd", ("a",)),
                    Optimizer("rmsprop", ("b",)),
                    Optimizer("sgd", ("c",)),
                ),
                rounds="alternate",
                zero="end",
                micro_batches=3,
                losses=2,
                clips=(Clip("data", over="own", when="each"), Clip("data", tight=False)),
                added_at=1,
                schedule=True,
            ),
        ),
    ),
)
