"""Known errors of the tracer: differences that do not fail a test until they are fixed.

Each gap has the loops in which it shows and the checks that find it there; every other check passes
in these loops too. When the examples of a gap no longer show it, a test fails: remove the gap from
this list, or the check from its gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.oracle.generator import Clip, Loop, Optimizer, shares_parameters


@dataclass(frozen=True)
class Gap:
    """One known error."""

    name: str
    why: str
    """The error in one sentence."""
    shows_in: Callable[[Loop], bool]
    checks: tuple[str, ...]
    examples: tuple[Loop, ...]
    """Loops in which, taken together, every one of the checks finds it."""


CLOBBERED = "bad argument to internal function"
"""The error of a thread that builds a tuple while another one calls gc.get_objects(), as the
tracer does to find an optimizer. It comes by chance: the loop is run again."""

# ---------------------------------------------------------------- where they show


def everywhere(loop: Loop) -> bool:
    return True


def has_several(loop: Loop) -> bool:
    return len(loop.optimizers) > 1 or loop.sparse


def has_outside(loop: Loop) -> bool:
    """Whether some parameters are in no optimizer."""
    held = {layer for optimizer in loop.optimizers for layer in optimizer.layers}
    return len(held) < len(loop.layers) or loop.replaced_at is not None


def has_lbfgs(loop: Loop) -> bool:
    return any(optimizer.kind == "lbfgs" for optimizer in loop.optimizers)


def clips_when(loop: Loop, *when: str) -> bool:
    return any(clip.when in when for clip in loop.clips)


def clips_after_its_step(loop: Loop) -> bool:
    """Whether some clip changes gradients that an optimizer has already used."""
    own = any(clip.over == "own" for clip in loop.clips)
    return clips_when(loop, "after") or (own and shares_parameters(loop))


def clips_kind(loop: Loop, *kinds: str) -> bool:
    return any(clip.kind in kinds for clip in loop.clips)


def adds_group(loop: Loop) -> bool:
    return loop.added_at is not None or (loop.unfrozen_at is not None and loop.frozen == "left out")


def clips_scaled(loop: Loop) -> bool:
    """Whether a clip sees gradients with a loss scale on them."""
    return loop.scaler in ("scale", "divide") or (bool(loop.scaler) and clips_when(loop, "each"))


def clips_a_part(loop: Loop) -> bool:
    """Whether a clip covers other parameters than the optimizer's."""
    return bool(loop.clips) and (
        has_several(loop) or has_outside(loop) or any(clip.over != "all" for clip in loop.clips)
    )


def clips_before_it_is_seen(loop: Loop) -> bool:
    """Whether an optimizer may be unknown when gradients are clipped for the first time."""
    early = loop.zero in ("start", "before backward") and loop.rounds == "joint"
    seen = early and loop.zero_by == "optimizer"
    return bool(loop.clips) and not seen and (has_several(loop) or has_outside(loop))


# ---------------------------------------------------------------- loops that show them

TWO = (Optimizer(layers=("a",)), Optimizer(layers=("b",)))
CLOSURE = Loop(optimizers=(Optimizer(kind="adam", closure=True),))
LBFGS = (Optimizer(kind="lbfgs", closure=True),)

KNOWN_GAPS: tuple[Gap, ...] = (
    Gap(
        "time between phases",
        "What lies between two phases belongs to none, so phases do not sum to their step.",
        everywhere,
        ("whole_times",),
        (Loop(evaluates=True),),
    ),
    Gap(
        "unfinished step",
        "A step that began and never ended is nowhere.",
        everywhere,
        ("unfinished",),
        (Loop(stops_early=True),),
    ),
    Gap(
        "forward inside a closure",
        "The model's call inside a closure is not seen.",
        lambda loop: loop.closures,
        ("forwards",),
        (CLOSURE,),
    ),
    Gap(
        "several backwards in a closure",
        "Of several losses in one evaluation of a closure only the first counts.",
        lambda loop: loop.closures and loop.losses > 1,
        ("losses", "shown"),
        (Loop(optimizers=CLOSURE.optimizers, losses=2),),
    ),
    Gap(
        "LBFGS",
        "The loss is that of the first evaluation, gradients and clips those of the last.",
        has_lbfgs,
        ("gradient_norms", "total_norms", "clips", "shares", "shown"),
        (
            Loop(optimizers=LBFGS, clips=(Clip(),)),
            Loop(iterations=5, optimizers=LBFGS, clips=(Clip(tight=False), Clip("infinity"))),
            Loop(iterations=5, optimizers=LBFGS, clips=(Clip("value"),)),
        ),
    ),
    Gap(
        "updates by hand",
        "Without an optimizer there are no steps.",
        lambda loop: loop.by_hand,
        ("steps", "header", "shown", "alarms"),
        (Loop(optimizers=(Optimizer(kind="data"),), poison_at=1),),
    ),
    Gap(
        "gradients by torch.autograd.grad",
        "torch.autograd.grad is no backward: the loss is NaN, and what was read stays current.",
        lambda loop: loop.gradients == "assigned",
        ("losses", "phases", "shown", "gradient_norms", "total_norms"),
        (
            Loop(gradients="assigned"),
            Loop(gradients="assigned", clips=(Clip(when="after"),)),
        ),
    ),
    Gap(
        "clip after the step",
        "A clip after the step is booked on the next step, as if it had been clipped.",
        clips_after_its_step,
        ("clips", "total_norms", "shown"),
        (Loop(clips=(Clip(when="after"),)),),
    ),
    Gap(
        "clip of thrown away gradients",
        "A clip of gradients that zero_grad then throws away is booked on the next step.",
        lambda loop: loop.rounds == "alternate" and clips_a_part(loop),
        ("clips",),
        (Loop(optimizers=TWO, rounds="alternate", clips=(Clip(),)),),
    ),
    Gap(
        "batches skipped by hand",
        "What zero_grad throws away is merged into the next step.",
        lambda loop: loop.skip.startswith("after") or clips_kind(loop, "strict"),
        ("skipped_iterations", "losses", "clips", "shown"),
        (
            Loop(iterations=4, skip="after clip", skip_at=1, clips=(Clip(),)),
            Loop(iterations=4, clips=(Clip("strict"),), poison_at=1),
            Loop(iterations=2, skip="after clip", skip_at=0, clips=(Clip(),)),
        ),
    ),
    Gap(
        "what a scaler skipped",
        "A step that a GradScaler skipped is announced, but without its numbers.",
        lambda loop: loop.overflow_at is not None,
        ("skipped_by_scaler",),
        (Loop(scaler="unscale", overflow_at=1),),
    ),
    Gap(
        "a clip of scaled gradients",
        "Norms of a clip are unscaled, though the clip saw the scaled ones, and nothing says so.",
        clips_scaled,
        ("clips",),
        (Loop(scaler="scale", clips=(Clip(),)),),
    ),
    Gap(
        "a scaled loss that was divided",
        "Of scaler.scale(loss) / n the scaled value is shown.",
        lambda loop: loop.scaler == "divide" and loop.micro_batches > 1,
        ("losses", "shown"),
        (Loop(scaler="divide", micro_batches=2),),
    ),
    Gap(
        "a group added to an optimizer",
        "An optimizer with a further group is taken for another one, and its clip is lost.",
        adds_group,
        ("optimizers", "header", "shown", "clips", "gradient_norms", "total_norms"),
        (
            Loop(added_at=1, clips=(Clip(),)),
            Loop(
                optimizers=(Optimizer(layers=("b",)),),
                frozen="left out",
                unfrozen_at=1,
            ),
        ),
    ),
    Gap(
        "unfrozen parameters",
        "A parameter that is unfrozen stays described as frozen.",
        lambda loop: loop.unfrozen_at is not None,
        ("header",),
        (Loop(frozen="held", unfrozen_at=1),),
    ),
    Gap(
        "replaced layers",
        "A layer that takes the place of another is not noticed.",
        lambda loop: loop.replaced_at is not None,
        ("header",),
        (Loop(replaced_at=1),),
    ),
    Gap(
        "gradients that are not there",
        "A gradient that is not there has the norm 0.",
        lambda loop: bool(loop.frozen) or loop.unused or loop.empty,
        ("absent_gradients",),
        (Loop(unused=True),),
    ),
    Gap(
        "parameters without a gradient among the shares",
        "Parameters that were not clipped are listed among those that dominate a clip.",
        lambda loop: bool(loop.frozen) or loop.unused or loop.empty,
        ("shares",),
        (Loop(unused=True, clips=(Clip(),)),),
    ),
    Gap(
        "parameters in no optimizer",
        "Their gradients are not watched, and not to blame.",
        has_outside,
        ("outside_gradients", "alarms"),
        (
            Loop(optimizers=(Optimizer(layers=("b",)),)),
            Loop(optimizers=(Optimizer(layers=("b",)),), scaler="unscale", overflow_at=1),
        ),
    ),
    Gap(
        "shares of a clip over other parameters",
        "Shares are of the optimizer's gradients, not of those that were clipped.",
        clips_a_part,
        ("shares",),
        (Loop(clips=(Clip(over="first"),)),),
    ),
    Gap(
        "shares of one clip among several",
        "Shares are of the gradients after the last backward, whichever clip is shown.",
        lambda loop: loop.micro_batches > 1 and clips_when(loop, "each"),
        ("shares",),
        (Loop(iterations=2, micro_batches=2, clips=(Clip(when="each"),)),),
    ),
    Gap(
        "an optimizer that was not seen before its first clip",
        "The search for it looks for the owner of the first parameter alone.",
        clips_before_it_is_seen,
        ("clips", "total_norms", "gradient_norms"),
        (
            Loop(
                iterations=2,
                zero="end",
                optimizers=(Optimizer(), Optimizer(layers=("b",))),
                clips=(Clip(),),
            ),
        ),
    ),
    Gap(
        "the time of a clip between two optimizers",
        "The time of a clip goes to the step that ends next, whosever gradients it clipped.",
        lambda loop: has_several(loop) and any(clip.over != "all" for clip in loop.clips),
        ("own_phases",),
        (Loop(sparse=True, clips=(Clip(over="own"),)),),
    ),
    Gap(
        "losses of several optimizers",
        "An optimizer's loss is what came since the last step of any, not since its own.",
        lambda loop: loop.rounds == "alternate",
        ("losses",),
        (Loop(optimizers=TWO, rounds="alternate", zero="never"),),
    ),
    Gap(
        "show of several optimizers",
        "show gives the values of the first optimizer as those of the run's last step.",
        has_several,
        ("shown",),
        (Loop(optimizers=TWO),),
    ),
    Gap(
        "clipping by hand",
        "Gradients that the script itself scales are not clipped; their norms are those after.",
        lambda loop: clips_kind(loop, "hand", "data"),
        ("clips", "gradient_norms", "total_norms", "shown"),
        (Loop(clips=(Clip("hand"),)), Loop(clips=(Clip("data"),))),
    ),
    Gap(
        "huge and tiny gradients",
        "Norms overflow and underflow in float32, and the overflow is an alarm.",
        lambda loop: loop.size != "normal",
        ("gradient_norms", "total_norms", "alarms", "clips", "shown"),
        (
            Loop(size="huge", clips=(Clip(),)),
            Loop(size="tiny", clips=(Clip(),)),
        ),
    ),
    Gap(
        "a clip that overflowed",
        "A clip whose own norm overflowed is exported as no clip.",
        lambda loop: loop.size == "huge" and bool(loop.clips),
        ("exported",),
        (Loop(size="huge", clips=(Clip(),)),),
    ),
    Gap(
        "update ratios of weights that are 0",
        "The update ratio is NaN where there is none.",
        lambda loop: loop.zero_bias,
        ("update_ratios",),
        (Loop(zero_bias=True),),
    ),
    Gap(
        "update ratios of weights that are not finite",
        "The update ratio of NaN weights is 0.",
        lambda loop: loop.poison_at is not None,
        ("update_ratios",),
        (Loop(iterations=4, poison_at=1),),
    ),
    Gap(
        "update ratios in low precision",
        "The difference of two weights is rounded to their precision.",
        lambda loop: loop.dtype == "bfloat16",
        ("update_ratios",),
        (Loop(optimizers=(Optimizer(kind="adam"),), dtype="bfloat16", iterations=5),),
    ),
    Gap(
        "norms in low precision",
        "Norms around a clip are computed in the precision of the gradients.",
        lambda loop: loop.dtype == "bfloat16" and bool(loop.clips),
        ("total_norms", "clips", "shown"),
        (
            Loop(dtype="bfloat16", clips=(Clip(),)),
            Loop(dtype="bfloat16", clips=(Clip("value", tight=False),)),
        ),
    ),
    Gap(
        "an empty parameter",
        "The update ratio of a parameter without elements is 0.",
        lambda loop: loop.empty,
        ("update_ratios",),
        (Loop(empty=True),),
    ),
    Gap(
        "norms that were not measured",
        "A step that did not measure its norm repeats the last one.",
        lambda loop: loop.measured_every > 1,
        ("total_norms", "shown"),
        (Loop(measured_every=2, iterations=4),),
    ),
)
