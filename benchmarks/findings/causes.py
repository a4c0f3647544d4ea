"""Which rules name which cause. Written after the programs, from docs/findings.md."""

from __future__ import annotations

from benchmarks.findings.planted import Cause

RULES: dict[Cause, tuple[str, ...]] = {
    "gradients of earlier steps are kept": ("gradients-kept",),
    "parameters are in no optimizer": ("not-in-optimizer",),
    "the optimizer has parameters that the model no longer uses": (
        "no-gradients",
        "not-in-optimizer",
    ),
    "ranks train apart": ("ranks-diverge",),
    "one rank clips alone": ("clips-alone",),
    "weights are too large at the start": ("initial-loss", "initial-scale"),
    "units are identical at the start": ("constant-weights",),
    "frozen after it was trained": ("frozen-late",),
    "dropout is off": ("eval-mode", "dropout-off"),
    "batches repeat": ("batches-repeat", "same-batch"),
    "inputs are scaled too small": ("input-scale",),
    "inputs are not normalized": ("input-scale",),
    "targets are not normalized": (),
    "normalization layers are missing": ("gradients-vanish", "signal-vanishes"),
    "over-fitting": ("over-fitting",),
    "decay or penalty is too strong": ("weights-shrink",),
    "gradients point uphill": ("loss-diverges",),
    "steps are too large": ("update-ratio-high", "adam-epsilon"),
    "steps are too small": ("update-ratio-low", "updates-small"),
    "the loss expects probabilities or their logarithms": ("log-of-logits",),
    "softmax before cross-entropy": ("softmax-before-cross-entropy",),
    "classes are unbalanced": ("unbalanced-classes",),
    "softmax as a hidden activation": ("softmax-inside",),
    # The hint names both: it cannot tell which of them it is.
    "augmentation destroys the inputs": ("no-better-than-prior",),
    "labels have nothing to do with inputs": ("no-progress", "no-better-than-prior"),
    "the loss is scaled": ("loss-scaled",),
    "squared error for classes": ("squared-error-of-softmax",),
    "softmax over the wrong axis": ("softmax-over-batch",),
    # Set E: these rules were written after its first run.
    "outputs cannot reach the targets": ("targets-out-of-reach",),
    "weights are overwritten after the step": ("updates-undone",),
    "embeddings collapse": (),
    "outputs and targets are misaligned": ("classes-mixed",),
    "gradients of another loss in the step": ("losses-mixed",),
    "updates are lost to rounding": ("updates-rounded",),
    "batches are not shuffled": ("not-shuffled",),
    "one term drowns the loss": (),
    "statistics of a frozen part change": (),
    "clipping comes after the step": ("clipped-after-step",),
    "batch and time are mixed up": (),
    "clipping of scaled gradients": (),
    "the schedule belongs to another optimizer": ("schedule-idle",),
    "nan or inf": ("non-finite",),
}
