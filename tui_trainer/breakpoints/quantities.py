"""The quantities and functions that a condition can name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tui_trainer.breakpoints.compiled import ConditionQuantity
from tui_trainer.protocol import PHASES, schema


def _attention(names: Iterable[str], table: str) -> list[ConditionQuantity]:
    text = "of the attention layers: (any), (layer=2) or a pattern"
    return [ConditionQuantity(name, f"{name} {text}", "step", table) for name in names]


SCALARS = {
    quantity.name: quantity
    for quantity in (
        ConditionQuantity("step", "the number of the optimizer step", "data"),
        ConditionQuantity("loss", "the loss of the step", "loss", schema.STEP),
        ConditionQuantity("learning_rate", "the learning rate", "step", schema.STEP),
        ConditionQuantity("lr", "the learning rate", "step", schema.STEP),
        ConditionQuantity(
            "grad_norm", "the norm of all gradients before clipping", "backward", schema.STEP
        ),
        ConditionQuantity(
            "step_ms", "the duration of the step in milliseconds", "step", schema.STEP
        ),
        ConditionQuantity("clip.scale", "the factor that clipping applied", "clip", schema.CLIP),
        ConditionQuantity("clip.max_norm", "the threshold of the clipping", "clip", schema.CLIP),
        ConditionQuantity("clip.norm_before", "the norm before clipping", "clip", schema.CLIP),
        ConditionQuantity("clip.norm_after", "the norm after clipping", "clip", schema.CLIP),
    )
}
"""Quantities of one number."""

COLUMN_QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        ConditionQuantity("grad_norm", "norms of gradients: (any) or a pattern of parameter names",
                 "backward", schema.GRAD_NORM),
        ConditionQuantity("weight_norm", "norms of parameters", "step", schema.WEIGHT_NORM),
        ConditionQuantity("update_ratio", "sizes of updates relative to the weights", "step",
                 schema.UPDATE_RATIO),
        ConditionQuantity(
            "phase_ms", 'milliseconds of a phase: phase_ms("data")', "step", schema.PHASE_MS
        ),
        *_attention(schema.ATTENTION_STATISTICS, schema.ATTENTION),
        *_attention(schema.SPECTRUM_STATISTICS, schema.ATTENTION_SPECTRUM),
        *_attention(schema.HEALTH_STATISTICS, schema.ATTENTION_HEALTH),
    )
}  # fmt: skip
"""Quantities of several columns, called with a selector."""

NONFINITE, FINDING, ANY, RANK = "nonfinite", "finding", "any", "rank"
LOGS = {"log": schema.LOGGED, "logged": schema.LOGGED, "validation": schema.VALIDATION}
"""Functions that read values by their names, and the table that has them."""
RANK_QUANTITIES = {
    "loss": "loss",
    "grad_norm": "grad_norm_preclip",
    "step_ms": "step_ms",
    "lag_ms": "lag_ms",
}
"""What `rank(1).` can be followed by, and the column that it is in."""
WITH_RANKS = ("step", "loss", "grad_norm", "learning_rate", "lr", "step_ms")
"""Quantities that one condition can use with those of ranks: they are known for past steps."""
EMA, ABS, MINIMUM, MAXIMUM = "ema", "abs", "min", "max"
FUNCTIONS = {
    FINDING: "a new finding, by (part of) the name of its rule",
    "log": "a number that the script logs with tui_trainer.log",
    "logged": "the same as log",
    "validation": "a result of an evaluation, such as its loss",
    RANK: "a quantity of one process, or of any: rank(1).loss, rank(any).grad_norm",
    EMA: "the exponential mean of a quantity over the previous steps",
    ABS: "the absolute value",
    MINIMUM: "the smallest of numbers, or of several columns",
    MAXIMUM: "the largest of numbers, or of several columns",
}
NAMES = tuple(dict.fromkeys((NONFINITE, *SCALARS, *COLUMN_QUANTITIES, *FUNCTIONS)))
"""All names, for completion."""


def completions(text: str) -> list[str]:
    """Completions of the last word of `text`: a quantity, a function or a phase."""
    at = re.search(r"(?:^|\s)at\s+(\w*)$", text)
    if at is not None:
        start, words = at.start(1), [*map(str, PHASES)]
    else:
        word = re.search(r"[A-Za-z_][\w.]*$", text)
        if word is None or text.count('"') % 2:
            return []
        start = word.start()
        words = [f"{n}(" if n in FUNCTIONS or (n in COLUMN_QUANTITIES and n not in SCALARS) else n
                 for n in NAMES]  # fmt: skip
        words += [f"{n}(" for n in COLUMN_QUANTITIES if n in SCALARS]
    given = text[start:]
    return [text[:start] + word for word in words if word.startswith(given) and word != given]
