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
        also=("steps are too large",),
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

HELD_OUT = {"A2": SET_A2, "B2": SET_B2}
