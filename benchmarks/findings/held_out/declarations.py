"""The halves of sets A to D that were written after the rules, by authors who had read neither the
rules nor their documentation: what each program has wrong, as its author declared it.

The authors knew the kinds of fault that a set is about, and chose the models, the data, the loops
and the places of the faults. `cause`, `trigger`, `until`, `also` and `places` are what they wrote
down, in the words of `planted.Cause` where they meant the same.
"""

from __future__ import annotations

from benchmarks.findings.planted import Cause, Program


def _kind(
    script: str,
    name: str,
    cause: Cause,
    places: tuple[str, ...],
    trigger: int = 1,
    until: int = 0,
    also: tuple[Cause, ...] = (),
    steps: int = 120,
) -> Program:
    return Program(
        name,
        f"held_out/kinds/{script}.py",
        (name,),
        (name, "--clean"),
        steps=steps,
        cause=cause,
        trigger=trigger,
        until=until,
        also=also,
        places=places,
    )


SET_A2 = (
    _kind(
        "pictures",
        "nan-in-forward",
        "nan or inf",
        ("code*", "forward"),
        trigger=58,
    ),
    _kind(
        "pictures",
        "frozen-backbone",
        "almost everything is frozen",
        ("backbone.*",),
        also=("parameters get no gradient",),
    ),
    _kind("pictures", "dead-relu", "units are dead", ("body.*", "forward")),
    _kind(
        "pictures",
        "initial-loss",
        "weights are too large at the start",
        ("head*", "loss", "forward"),
    ),
    _kind("pictures", "rate-jump", "the learning rate jumps", ("step",), trigger=81, until=82),
    _kind(
        "sequences",
        "no-warmup",
        "warm-up is missing",
        ("step",),
        also=("steps are too large",),
    ),
    _kind(
        "sequences",
        "zero-before-step",
        "gradients are zeroed before the step",
        ("zero_grad", "step"),
    ),
    _kind(
        "sequences",
        "exploding-rnn",
        "gradients explode",
        ("loop*", "enter*", "backward", "clip"),
    ),
    _kind(
        "sequences",
        "schedule-per-batch",
        "the schedule ends early",
        ("step",),
        until=25,
        also=("steps are too small",),
    ),
    _kind(
        "sequences",
        "early-optimizer",
        "the optimizer has parameters that the model no longer uses",
        ("embed.weight", "out.weight", "out.bias", "step"),
    ),
    _kind("sequences", "left-out-module", "parameters are in no optimizer", ("pool.*", "step")),
    _kind("tables", "vanishing-depth", "gradients vanish", ("stack.*", "backward")),
    _kind(
        "tables",
        "saturated-units",
        "units are saturated",
        ("first*", "data", "forward"),
        also=("inputs are not normalized",),
    ),
    _kind("tables", "tiny-updates", "steps are too small", ("step",)),
    _kind("tables", "rate-zero", "the learning rate is zero", ("step",), trigger=41),
    _kind("pairs", "double-backward", "backward is called twice", ("backward",)),
    _kind("pairs", "unused-tower", "parameters get no gradient", ("item_tower.*", "forward")),
    _kind(
        "pairs",
        "no-zero-grad",
        "gradients of earlier steps are kept",
        ("zero_grad",),
        until=2,
    ),
    _kind(
        "pairs",
        "nan-gradient",
        "nan or inf",
        ("distance*", "backward", "embed.*"),
        trigger=54,
    ),
    _kind(
        "pairs",
        "group-rate",
        "steps of a part are too large",
        ("users.weight", "items.weight", "step"),
    ),
    _kind(
        "vision",
        "validation_mode",
        "the model trains in eval mode",
        ("validation", "forward", "features*", "classifier*"),
        trigger=30,
        until=31,
    ),
    _kind(
        "vision",
        "noisy_validation",
        "the model is evaluated in train mode",
        ("validation", "stem*", "blocks*", "dropout"),
        trigger=20,
        until=21,
    ),
    _kind("vision", "pixel_scale", "inputs are not normalized", ("data", "forward", "conv1*")),
    _kind("vision", "worker_crops", "batches repeat", ("data",), trigger=2),
    _kind("vision", "attributes", "targets are out of range", ("data", "loss", "logits*")),
    _kind(
        "tokens",
        "sharp_decoder",
        "attention logits grow",
        ("attention*", "forward", "step"),
        until=60,
        also=("attention collapses", "steps are too large"),
        steps=200,
    ),
    _kind(
        "tokens",
        "fast_layer",
        "attention collapses",
        ("blocks.1.attention*", "forward", "step"),
        until=60,
        also=("steps of a part are too large",),
        steps=200,
    ),
    _kind("tokens", "first_page", "batches repeat", ("data",), until=2),
    _kind(
        "tokens",
        "new_words",
        "tied weights are no longer tied",
        ("embedding.weight", "output.weight", "step"),
        trigger=61,
    ),
    _kind(
        "tokens",
        "careful_clipping",
        "clipping leaves almost nothing",
        ("clip",),
        also=("steps are too small",),
    ),
    _kind(
        "records",
        "fresh_order",
        "labels have nothing to do with inputs",
        ("data",),
        steps=300,
    ),
    _kind("records", "count_features", "inputs are rounded to integers", ("data", "enter*")),
    _kind(
        "records", "sensors", "one batch is corrupt", ("data", "forward", "loss", "0.*"), trigger=60
    ),
    _kind("records", "churn", "labels are constant", ("data", "loss")),
    _kind(
        "records",
        "quick_look",
        "over-fitting",
        ("validation", "data"),
        trigger=40,
        until=100,
        steps=300,
    ),
    _kind(
        "records",
        "demand",
        "the loss oscillates",
        ("step", "weight", "bias", "loss"),
        until=18,
        also=("steps are too large", "the momentum is too high"),
        steps=300,
    ),
    _kind("signals", "denoise", "the schedule ends early", ("step",), until=25),
    _kind(
        "signals",
        "forecast",
        "the loss diverges",
        ("step", "loss"),
        trigger=11,
        until=120,
        also=("steps are too large",),
        steps=300,
    ),
    _kind(
        "signals",
        "triplets",
        "values grow until they overflow",
        ("point.weight", "loss", "forward"),
        until=95,
        also=("nan or inf",),
    ),
    _kind("signals", "bands", "softmax before cross-entropy", ("last*", "forward", "loss")),
    _kind("signals", "spectra", "inputs are constant", ("data", "conv1*")),
)


def _silent(
    script: str,
    name: str,
    cause: Cause,
    places: tuple[str, ...],
    trigger: int = 1,
    until: int = 0,
    ranks: int = 1,
) -> Program:
    return Program(
        name,
        f"held_out/silent/{script}.py",
        (name,),
        (name, "--clean"),
        ranks=ranks,
        cause=cause,
        trigger=trigger,
        until=until,
        places=places,
    )


SET_B2 = (
    _silent(
        "forecast",
        "no_zero_grad",
        "gradients of earlier steps are kept",
        ("zero_grad", "backward", "step"),
        trigger=2,
    ),
    _silent(
        "textures", "backbone_left_out", "parameters are in no optimizer", ("backbone.*", "step")
    ),
    _silent(
        "tagger",
        "model_rebuilt",
        "the optimizer has parameters that the model no longer uses",
        ("0.*", "1.*", "2.*", "3.*", "4.*", "step", "zero_grad"),
        trigger=41,
    ),
    _silent(
        "mixer_ddp",
        "hooks_lost",
        "ranks train apart",
        ("backward", "rank *"),
        trigger=37,
        ranks=2,
    ),
    _silent("gru_ddp", "clip_on_rank0", "one rank clips alone", ("clip", "rank *"), ranks=2),
    _silent(
        "segment_dist",
        "unused_reduction",
        "ranks train apart",
        ("backward", "step", "rank *"),
        trigger=31,
        ranks=2,
    ),
    _silent(
        "towers_ddp",
        "wrapper_bypassed",
        "ranks train apart",
        ("forward", "backward", "rank *"),
        ranks=2,
    ),
    _silent(
        "gpt",
        "init_std",
        "weights are too large at the start",
        ("forward", "loss", "tokens*", "positions*", "blocks*"),
    ),
    _silent(
        "stages",
        "frozen_late",
        "frozen after it was trained",
        ("stages.0.0.weight", "stages.1.0.weight"),
        until=31,
    ),
    _silent("sequences", "encoder_in_eval", "dropout is off", ("encoder*",), trigger=36),
    _silent("stream", "same_worker_seed", "batches repeat", ("data",), trigger=2),
)

_SCRIPTS = {"mlp": "tabular", "cnn": "images", "gpt": "text"}


def _fault(
    kind: str,
    fault: str,
    cause: Cause,
    places: tuple[str, ...],
    until: int = 0,
    also: tuple[Cause, ...] = (),
) -> Program:
    return Program(
        f"{kind} {fault}",
        f"held_out/faults/{_SCRIPTS[kind]}.py",
        (kind, fault),
        (kind, fault, "--clean"),
        cause=cause,
        until=until,
        also=also,
        places=places,
    )


_FIRST = {"mlp": "body.0*", "cnn": "conv1*", "gpt": "tokens*"}
_BODY = {"mlp": ("body*", "head*"), "cnn": ("conv*", "head*"), "gpt": ("blocks*", "tokens*")}
_HEAD = {"mlp": "head*", "cnn": "head*", "gpt": "tokens*"}
_ALL = ("mlp", "cnn", "gpt")
_TABLES_AND_IMAGES = ("mlp", "cnn")

SET_C2 = (
    *(
        _fault(
            kind,
            "double_norm",
            "inputs are scaled too small",
            ("data", _FIRST[kind]),
            also=("inputs are constant",),
        )
        for kind in _TABLES_AND_IMAGES
    ),
    *(
        _fault(kind, "missing_norm", "inputs are not normalized", ("data", _FIRST[kind], "forward"))
        for kind in _TABLES_AND_IMAGES
    ),
    *(
        _fault(
            kind, "overscaled_targets", "targets are not normalized", ("data", "loss", _HEAD[kind])
        )
        for kind in _TABLES_AND_IMAGES
    ),
    _fault(
        "cnn",
        "missing_batchnorm",
        "normalization layers are missing",
        ("layers*", "forward", "backward"),
    ),
    *(
        _fault(kind, "missing_regularization", "over-fitting", ("validation", "data"), until=60)
        for kind in _ALL
    ),
    *(
        _fault(kind, "over_regularization", "decay or penalty is too strong", ("loss", "step"))
        for kind in _ALL
    ),
    *(
        _fault(
            kind,
            "constant_init",
            "units are identical at the start",
            (*_BODY[kind], "forward", "backward"),
        )
        for kind in _ALL
    ),
    *(
        _fault(kind, "large_init", "weights are too large at the start", (*_BODY[kind], "forward"))
        for kind in _ALL
    ),
    *(_fault(kind, "flipped_sign", "gradients point uphill", ("step", "loss")) for kind in _ALL),
    *(_fault(kind, "lr_high", "steps are too large", ("step",)) for kind in _ALL),
    *(_fault(kind, "lr_low", "steps are too small", ("step",)) for kind in _ALL),
    _fault(
        "mlp",
        "optimizer_constant",
        "Adam's epsilon is too small",
        ("step", "body.0.weight"),
        until=2,
        also=("nan or inf",),
    ),
    _fault(
        "cnn",
        "optimizer_constant",
        "the loss oscillates",
        ("step",),
        until=40,
        also=("steps are too large", "the momentum is too high"),
    ),
    _fault("gpt", "optimizer_constant", "steps are too small", ("step",)),
    *(
        _fault(
            kind,
            "missing_softmax",
            "the loss expects probabilities or their logarithms",
            ("loss", _HEAD[kind]),
        )
        for kind in _ALL
    ),
    *(
        _fault(
            kind,
            "redundant_softmax",
            "softmax before cross-entropy",
            ("loss", "forward", _HEAD[kind]),
        )
        for kind in _ALL
    ),
    *(_fault(kind, "unbalanced", "classes are unbalanced", ("data",)) for kind in _ALL),
    *(
        _fault(
            kind,
            "wrong_activation",
            "softmax as a hidden activation",
            ("forward", *places),
        )
        for kind, places in (
            ("mlp", ("body*",)),
            ("cnn", ("act", "conv*")),
            ("gpt", ("blocks.*.act", "blocks.*.up*", "blocks.*.down*")),
        )
    ),
    _fault(
        "mlp",
        "wrong_augmentation",
        "augmentation destroys the inputs",
        ("data", "body.0*", "forward"),
        also=("inputs are not normalized",),
    ),
    *(
        _fault(kind, "wrong_augmentation", "augmentation destroys the inputs", ("data",))
        for kind in ("cnn", "gpt")
    ),
    *(
        _fault(kind, "shuffled_labels", "labels have nothing to do with inputs", ("data",))
        for kind in _ALL
    ),
    *(
        _fault(
            kind,
            fault,
            "the loss is scaled",
            ("loss", "step"),
            also=("steps are too large",),
        )
        for kind in _ALL
        for fault in ("wrong_reduction", "wrong_axis")
        if (kind, fault) != ("gpt", "wrong_axis")
    ),
    _fault(
        "gpt",
        "wrong_axis",
        "softmax over the wrong axis",
        ("loss", "tokens*"),
    ),
    *(_fault(kind, "wrong_loss", "squared error for classes", ("loss",)) for kind in _ALL),
    _fault("mlp", "wrong_softmax", "softmax is not normalized", ("loss", "head*")),
    _fault("cnn", "wrong_softmax", "softmax over the wrong axis", ("loss", "head*")),
    _fault(
        "gpt",
        "wrong_softmax",
        "softmax over the wrong axis",
        ("blocks.*.attention*", "forward"),
    ),
)


def _clean(script: str, *names: str) -> tuple[Program, ...]:
    return tuple(
        Program(name, f"held_out/clean/{script}.py", (name, "500"), clean_arguments=(), steps=500)
        for name in names
    )


SET_D2 = (
    *_clean(
        "vision", "digits", "resnet", "mixup", "unet", "detector", "finetune", "distill", "vit"
    ),
    *_clean("sequences", "letter_lm", "gpt", "mlm", "seq2seq", "ctc", "forecast", "keywords"),
    *_clean("generative", "dcgan", "vae", "vqvae", "flow", "diffusion", "simclr"),
    *_clean(
        "tabular",
        "gcn",
        "set_transformer",
        "recommender",
        "survival",
        "housing",
        "ranking",
        "multitask",
    ),
    *_clean("dynamics", "pinn", "neural_ode", "reinforce", "dqn", "ppo", "maml"),
)

HELD_OUT = {"A2": SET_A2, "B2": SET_B2, "C2": SET_C2, "D2": SET_D2}
