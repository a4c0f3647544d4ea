"""What a step is made of and what is measured, in a sentence each, for people who learn."""

from __future__ import annotations

from tui_trainer.protocol.describe import RunInfo
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.panels.ages import stretched
from tui_trainer.ui.panels.attention_statistics import STATISTICS

PHASES = (
    ("data", "the next batch of inputs and targets is fetched"),
    ("zero_grad", "the gradients of the step before are thrown away"),
    ("forward", "the model turns inputs into predictions"),
    ("loss", "one number says how wrong they are"),
    ("backward", "from it, the gradient of every parameter: where to go to make it smaller"),
    ("clip", "a gradient that is too long is shortened, its direction kept"),
    ("step", "the optimizer moves the parameters, a little, against the gradient"),
)

QUANTITIES = (
    ("loss", "what training makes smaller; validation: the same on data never trained on"),
    ("gradient norm", "‖∂L/∂p‖₂ of a parameter, before clipping and after un-scaling"),
    ("total norm", "√Σ‖gᵢ‖² over all parameters: what clipping compares with its threshold"),
    (
        "clip scale",
        "by norm min(1, max_norm / (norm + 1e-6)), by value the norm after / the norm before: "
        "below 1 the step was clipped",
    ),
    ("share", "‖gᵢ‖² / Σ‖g‖²: how much of the total norm is this parameter's"),
    ("update ratio", "‖Δw‖ / ‖w‖ of one step: healthy near 1e-3, above 1e-2 too fast"),
    ("weight norm", "‖w‖₂; without weight decay it mostly grows"),
    ("non-finite", "NaN or infinity: usually a step too large, or a number too big for its type"),
    (
        "own cost",
        "time that our code takes on the training thread, by its own clock, as a share of all its "
        "time. Not in it: caches that it empties, threads it wakes, what the viewer and other "
        "processes take of the machine",
    ),
)

ATTENTION = tuple((each.title, f"{each.means}. Healthy: {each.healthy}") for each in STATISTICS)


def cadences(info: RunInfo | None) -> tuple[tuple[str, str], ...]:
    """What is measured less often now than it naturally is, to stay within the run's budget."""
    if info is None:
        return ()
    nothing = ("nothing", "each quantity is measured as often as it naturally is")
    return tuple(stretched(info)) or (nothing,)


def signs(glyphs: Glyphs) -> tuple[tuple[str, str], ...]:
    """What the signs mean, as `glyphs` has them."""
    return (
        (glyphs.point, "on the loss: a validation; on the line of a replay: a note"),
        (glyphs.deed, "on the axis of a chart: a command or a note was given there"),
        (glyphs.mark, "on the axis of the clipping, on the line of a replay: a clipped step"),
        (glyphs.failed, "on the line of a replay: a value that was not finite"),
        (glyphs.ascending, "on the line of a replay: the worst spike of the loss"),
        ("yellow, slanted", "a value of the step in the making, while paused inside it"),
        ("layer*", "there is a note on this layer: screen 2 has it where the cursor is on it"),
        (glyphs.missing, "not measured yet"),
        ("n/a", "a comparison that has no meaning here; the screen says why"),
        ("! in a trend", "something was not finite there"),
    )
