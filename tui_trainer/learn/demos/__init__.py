"""Guided runs: short trainings with one fault each, and what to see in them.

Each script trains on handwritten digits; with `--cured` it does so without the fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Demo:
    """One guided run."""

    name: str
    happens: str
    """What will happen, in one sentence."""
    screen: str
    """The screen to watch: a mode of the app."""
    rule: str
    """The rule whose finding names the fault."""
    breakpoint: str
    """The condition that pauses the run there."""
    cure: str
    live: str = ""
    """The change to make while it is paused, as for `tui-trainer set`, where one is a cure."""

    @property
    def script(self) -> Path:
        """The program that trains."""
        return HERE / f"{self.name.replace('-', '_')}.py"


DEMOS = (
    Demo(
        "zero-grad",
        "zero_grad is forgotten: each backward adds to the gradients of all steps before, and the "
        "steps grow until the loss rises",
        "findings",
        "gradients-kept",
        'finding("gradients-kept")',
        "call optimizer.zero_grad() once a step, before backward",
    ),
    Demo(
        "rate-high",
        "the learning rate is 200 times too high: each step jumps over the valley, and the loss "
        "goes up instead of down",
        "dashboard",
        "update-ratio-high",
        "loss > 5",
        "a learning rate of 0.1 instead of 20",
        "lr=0.1",
    ),
    Demo(
        "rate-low",
        "the learning rate is a million times too low: a step moves the weights by a millionth of "
        "their size, and the loss stands still",
        "parameters",
        "update-ratio-low",
        'finding("update-ratio-low")',
        "a learning rate of 0.1 instead of 1e-7",
        "lr=0.1",
    ),
    Demo(
        "exploding",
        "nothing limits the gradient, and the learning rate is high: each step overshoots by more "
        "than the one before, until the weights are nan",
        "dashboard",
        "gradients-explode",
        "loss > 2",
        "clip the norm of the gradient: clip_grad_norm_(model.parameters(), 0.1)",
        "lr=0.5",
    ),
    Demo(
        "vanishing",
        "twelve sigmoid layers: each shrinks the gradient, so that the first layers get almost "
        "none of it and the loss stays at ln 10",
        "parameters",
        "gradients-vanish",
        'finding("gradients-vanish")',
        "ReLUs with norms and residual connections, which the gradient can pass by",
    ),
    Demo(
        "dead-relu",
        "every unit of the second layer is zero for every image, so that nothing before it learns",
        "findings",
        "dead-units",
        'finding("dead-units")',
        "biases that start at zero",
    ),
    Demo(
        "missing-layer",
        "the first layer gets gradients but is never updated, because it was not given to the "
        "optimizer; the loss falls all the same",
        "parameters",
        "not-in-optimizer",
        'finding("not-in-optimizer")',
        "give model.parameters() to the optimizer, all of them",
    ),
    Demo(
        "shuffled-labels",
        "the labels were shuffled apart from their images: there is nothing to learn, and the loss "
        "stays at ln 10",
        "dashboard",
        "no-progress",
        'finding("no-progress")',
        "keep images and labels in one order",
    ),
    Demo(
        "attention",
        "Wq and Wk have a learning rate of their own, 50 times that of the rest: their norms and "
        "the logits blow up, and the alarm comes before the loss shows it",
        "attention",
        "attention-logits",
        'finding("attention-logits")',
        "one learning rate for all weights (or normalise queries and keys)",
        "lr[0]=0.001",
    ),
    Demo(
        "fp16-overflow",
        "a softmax written by hand overflows float16: the loss is nan, and the GradScaler skips "
        "step after step",
        "log",
        "loss-scale",
        "nonfinite at loss",
        "torch.softmax, which subtracts the maximum first (or bfloat16)",
    ),
    Demo(
        "bad-batch",
        "at step 100 three images are noise, a thousand times too bright: one huge loss, and "
        "hundreds of steps to recover",
        "dashboard",
        "bad-batch",
        "loss > 4 * ema(loss)",
        "leave such images out; clipping would limit the damage",
    ),
)
