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
    "ranks train apart": (),
    "one rank clips alone": (),
    "weights are too large at the start": ("initial-loss",),
    "units are identical at the start": (),
    "frozen after it was trained": (),
    "dropout is off": ("eval-mode",),
    "batches repeat": (),
    "inputs are scaled too small": (),
    "inputs are not normalized": (),
    "targets are not normalized": (),
    "normalization layers are missing": ("gradients-vanish",),
    "over-fitting": ("over-fitting",),
    "decay or penalty is too strong": (),
    "gradients point uphill": ("loss-diverges",),
    "steps are too large": ("update-ratio-high",),
    "steps are too small": ("update-ratio-low",),
    "the loss expects probabilities or their logarithms": (),
    "softmax before cross-entropy": ("softmax-before-cross-entropy",),
    "classes are unbalanced": (),
    "softmax as a hidden activation": (),
    "augmentation destroys the inputs": (),
    "labels have nothing to do with inputs": ("no-progress",),
    "the loss is scaled": ("update-ratio-high",),
    "squared error for classes": (),
    "softmax over the wrong axis": (),
}
