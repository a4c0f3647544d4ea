"""What the programs of sets B to E have wrong, and what a finding has to say of it.

Written before the rules were read (set E: after all the others and their rules, by an author who
had read only their list): `cause` names a class of problem in words of its own. Which
rules belong to a class is in `causes.py`, written afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent

Cause = Literal[
    "gradients of earlier steps are kept",
    "parameters are in no optimizer",
    "the optimizer has parameters that the model no longer uses",
    "ranks train apart",
    "one rank clips alone",
    "weights are too large at the start",
    "units are identical at the start",
    "frozen after it was trained",
    "dropout is off",
    "batches repeat",
    "inputs are scaled too small",
    "inputs are not normalized",
    "targets are not normalized",
    "normalization layers are missing",
    "over-fitting",
    "decay or penalty is too strong",
    "gradients point uphill",
    "steps are too large",
    "steps are too small",
    "the loss expects probabilities or their logarithms",
    "softmax before cross-entropy",
    "classes are unbalanced",
    "softmax as a hidden activation",
    "augmentation destroys the inputs",
    "labels have nothing to do with inputs",
    "the loss is scaled",
    "squared error for classes",
    "softmax over the wrong axis",
    "outputs cannot reach the targets",
    "weights are overwritten after the step",
    "embeddings collapse",
    "outputs and targets are misaligned",
    "gradients of another loss in the step",
    "updates are lost to rounding",
    "batches are not shuffled",
    "one term drowns the loss",
    "statistics of a frozen part change",
    "clipping comes after the step",
    "batch and time are mixed up",
    "clipping of scaled gradients",
    "the schedule belongs to another optimizer",
    "nan or inf",
    "the model trains in eval mode",
    "the model is evaluated in train mode",
    "targets are out of range",
    "attention logits grow",
    "attention collapses",
    "steps of a part are too large",
    "tied weights are no longer tied",
    "clipping leaves almost nothing",
    "inputs are rounded to integers",
    "one batch is corrupt",
    "labels are constant",
    "the loss oscillates",
    "the schedule ends early",
    "the loss diverges",
    "values grow until they overflow",
    "inputs are constant",
    "almost everything is frozen",
    "parameters get no gradient",
    "units are dead",
    "the learning rate jumps",
    "warm-up is missing",
    "gradients are zeroed before the step",
    "gradients explode",
    "gradients vanish",
    "units are saturated",
    "the learning rate is zero",
    "backward is called twice",
    "softmax is not normalized",
    "the momentum is too high",
    "Adam's epsilon is too small",
]


@dataclass(frozen=True)
class Program:
    """One program of a set, and its clean twin."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    clean_arguments: tuple[str, ...] = ("--clean",)
    """Arguments that make it the clean twin."""
    ranks: int = 1
    task: str = ""
    """A shipped task instead of a script."""
    steps: int = 100
    cause: Cause | None = None
    """None: nothing is wrong with it."""
    trigger: int = 1
    """The step from which the fault acts."""
    until: int = 0
    """The last step that is as right as `trigger`, if it is a later one."""
    also: tuple[Cause, ...] = ()
    """Causes that are as right an answer."""
    places: tuple[str, ...] = ()
    """Patterns of parameters, modules and phases; naming one of them is right."""


def _silent(
    name: str, cause: Cause, trigger: int, places: tuple[str, ...], ranks: int = 1
) -> Program:
    return Program(
        name, f"silent/{name}.py", ranks=ranks, cause=cause, trigger=trigger, places=places
    )


SET_B = (
    _silent(
        "zero_grad_missing", "gradients of earlier steps are kept", 2, ("zero_grad", "backward")
    ),
    _silent("head_alone", "parameters are in no optimizer", 1, ("backbone.*",)),
    _silent(
        "rewrapped",
        "the optimizer has parameters that the model no longer uses",
        31,
        ("*0.weight", "*0.bias", "*2.weight", "*2.bias", "step"),
        ranks=2,
    ),
    _silent("moved", "ranks train apart", 31, ("backward", "rank *", "*0.*", "*2.*"), ranks=2),
    _silent("clip_on_one_rank", "one rank clips alone", 1, ("clip", "rank *"), ranks=2),
    _silent("collective_lost", "ranks train apart", 31, ("backward", "step", "rank 1"), ranks=2),
    _silent("wrapper_bypassed", "ranks train apart", 31, ("backward", "rank *", "*0.*"), ranks=2),
    _silent(
        "wrong_initialisation",
        "weights are too large at the start",
        1,
        ("forward", "loss", "token*", "position*", "blocks*", "head*"),
    ),
    _silent("frozen_stages", "frozen after it was trained", 1, ("stages.0*",)),
    _silent("dropout_off", "dropout is off", 41, ("encoder*",)),
    _silent("same_seed", "batches repeat", 2, ("data",)),
)


def _fault(kind: str, fault: str, cause: Cause, places: tuple[str, ...]) -> Program:
    own_twin = fault in ("over_scaled_outputs", "missing_regularization", "low_adam_epsilon")
    return Program(
        f"{kind} {fault}",
        "faults.py",
        (kind, fault, "400"),
        (kind, fault if own_twin else "none", "400", "--clean"),
        cause=cause,
        places=places,
    )


_FIRST = {"mlp": "hidden_1*", "cnn": "features.0*", "gpt": "w?e*"}
_LAST = {"mlp": "out*", "cnn": "classifier*", "gpt": "lm_head*"}
_ALL = ("mlp", "cnn", "gpt")
_IMAGES_AND_ROWS = ("mlp", "cnn")

SET_C = (
    *(
        _fault(kind, "double_normalization", "inputs are scaled too small", ("data", _FIRST[kind]))
        for kind in _IMAGES_AND_ROWS
    ),
    *(
        _fault(kind, "missing_normalization", "inputs are not normalized", ("data", _FIRST[kind]))
        for kind in _IMAGES_AND_ROWS
    ),
    _fault("mlp", "over_scaled_outputs", "targets are not normalized", ("data", "loss", "out*")),
    _fault(
        "cnn", "missing_batchnorm", "normalization layers are missing", ("backward", "features*")
    ),
    *(
        _fault(kind, "missing_regularization", "over-fitting", ("loss", "validation", "data"))
        for kind in _ALL
    ),
    *(
        _fault(kind, "over_regularization", "decay or penalty is too strong", ("loss", "step"))
        for kind in _ALL
    ),
    *(
        _fault(kind, "constant_initialisation", "units are identical at the start", places)
        for kind, places in (
            ("mlp", ("hidden*", "out*")),
            ("cnn", ("features*", "classifier*")),
            ("gpt", ("blocks*", "w?e*", "lm_head*")),
        )
    ),
    *(
        _fault(kind, "large_initialisation", "weights are too large at the start", places)
        for kind, places in (
            ("mlp", ("forward", "loss", "hidden*", "out*")),
            ("cnn", ("forward", "loss", "features*", "classifier*")),
            ("gpt", ("forward", "loss", "blocks*", "w?e*", "lm_head*")),
        )
    ),
    *(
        _fault(kind, "flipped_sign", "gradients point uphill", ("backward", "step"))
        for kind in _ALL
    ),
    *(_fault(kind, "high_rate", "steps are too large", ("step",)) for kind in _ALL),
    *(_fault(kind, "low_rate", "steps are too small", ("step",)) for kind in _ALL),
    *(_fault(kind, "low_adam_epsilon", "steps are too large", ("step",)) for kind in _ALL),
    *(
        _fault(
            kind,
            "missing_softmax",
            "the loss expects probabilities or their logarithms",
            ("loss", _LAST[kind]),
        )
        for kind in _ALL
    ),
    *(
        _fault(
            kind,
            "redundant_softmax",
            "softmax before cross-entropy",
            ("loss", "forward", _LAST[kind]),
        )
        for kind in _ALL
    ),
    *(
        _fault(kind, "unbalanced_data", "classes are unbalanced", ("data", "loss"))
        for kind in _IMAGES_AND_ROWS
    ),
    *(
        _fault(kind, "wrong_activation", "softmax as a hidden activation", places)
        for kind, places in (
            ("mlp", ("act_*", "hidden_*")),
            ("cnn", ("features*",)),
            ("gpt", ("blocks.*.act", "blocks.*.fc*")),
        )
    ),
    *(
        _fault(kind, "wrong_augmentation", "augmentation destroys the inputs", ("data",))
        for kind in _IMAGES_AND_ROWS
    ),
    *(
        _fault(kind, "wrong_labels", "labels have nothing to do with inputs", ("data", "loss"))
        for kind in _ALL
    ),
    *(_fault(kind, "wrong_loss_reduction", "the loss is scaled", ("loss",)) for kind in _ALL),
    *(_fault(kind, "wrong_loss_axis", "the loss is scaled", ("loss",)) for kind in _ALL),
    *(
        _fault(kind, "wrong_loss_selection", "squared error for classes", ("loss", "forward"))
        for kind in _ALL
    ),
    *(
        _fault(
            kind, "wrong_softmax_implementation", "softmax over the wrong axis", ("loss", "forward")
        )
        for kind in _ALL
    ),
)


def _clean(script: str, *names: str) -> tuple[Program, ...]:
    return tuple(
        Program(name, f"clean/{script}.py", (name, "500"), clean_arguments=(), steps=500)
        for name in names
    )


def _task(name: str, *arguments: str) -> Program:
    return Program(name, "", arguments, clean_arguments=(), task=name.split()[0], steps=500)


_SMALL = (
    *("--layers", "2", "--heads", "2", "--width", "48", "--block-size", "32"),
    *("--batch-size", "8", "--eval-batches", "2", "--sample-every", "0"),
)

SET_D = (
    *_clean(
        "vision",
        "mnist_cnn",
        "resnet_one_cycle",
        "vae",
        "dcgan",
        "wasserstein_gan",
        "super_resolution",
        "siamese",
        "forward_forward",
        "contrastive",
        "diffusion",
    ),
    *_clean(
        "language",
        "word_language_model",
        "gpt_adamw",
        "gpt_accumulated",
        "lora",
        "translation",
        "word_vectors",
        "time_sequence_lbfgs",
        "characters_rmsprop",
    ),
    *_clean(
        "others",
        "gcn",
        "gat",
        "reinforce",
        "actor_critic",
        "deep_q",
        "regression",
        "recommender",
        "distillation",
        "mixture_of_experts",
        "frozen_then_unfrozen",
        "two_tasks",
    ),
    _task("gpt light"),
    _task("gpt nanogpt-cpu", "--preset", "nanogpt-cpu", "--batch-size", "4", "--layers", "2"),
    _task("gpt nanogpt-gpu", "--preset", "nanogpt-gpu", *_SMALL),
    _task("gpt gpt2", "--preset", "gpt2", "--vocabulary", "256", *_SMALL),
    _task("vit digits"),
)


def _unseen(
    script: str, name: str, cause: Cause, places: tuple[str, ...], trigger: int = 1
) -> Program:
    return Program(
        name,
        f"unseen/{script}.py",
        (name,),
        (name, "--clean"),
        cause=cause,
        trigger=trigger,
        places=places,
    )


SET_E = (
    _unseen(
        "images", "autoencoder_range", "outputs cannot reach the targets", ("loss", "decoder*")
    ),
    _unseen("images", "diffusion_average", "weights are overwritten after the step", ("step",)),
    _unseen("images", "siamese_collapse", "embeddings collapse", ("loss", "forward", "encoder*")),
    _unseen("images", "segmentation_view", "outputs and targets are misaligned", ("loss", "data")),
    _unseen(
        "images",
        "gan_not_detached",
        "gradients of another loss in the step",
        ("backward", "zero_grad", "0.*", "2.*"),
    ),
    _unseen("images", "rounded_updates", "updates are lost to rounding", ("step",)),
    _unseen("images", "sorted_classes", "batches are not shuffled", ("data",)),
    _unseen(
        "images", "vae_collapse", "one term drowns the loss", ("loss", "mean*", "log_variance*")
    ),
    _unseen("images", "frozen_statistics", "statistics of a frozen part change", ("backbone*",)),
    _unseen("sequences", "clipped_after_step", "clipping comes after the step", ("clip", "step")),
    _unseen(
        "sequences", "batch_not_first", "batch and time are mixed up", ("forward", "data", "lstm*")
    ),
    _unseen("sequences", "mask_inverted", "nan or inf", ("encoder.layers.0*",), trigger=60),
    _unseen("sequences", "clipped_while_scaled", "clipping of scaled gradients", ("clip",)),
    _unseen("sequences", "stale_schedule", "the schedule belongs to another optimizer", ("step",)),
    _unseen("tables", "raw_columns", "inputs are not normalized", ("data", "enter*")),
    _unseen("tables", "missing_values", "nan or inf", ("data",), trigger=70),
)

SETS = {"B": SET_B, "C": SET_C, "D": SET_D, "E": SET_E}
