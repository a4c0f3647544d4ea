"""Training loops as data: their variations, how a loop is drawn, and the script it generates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Literal

from hypothesis import strategies as st

WIDTH = 4
SIZES = {"normal": 1.0, "huge": 1e20, "tiny": 1e-25}
"""Factors of the loss."""


@dataclass(frozen=True)
class Optimizer:
    """One optimizer, or an update by hand."""

    kind: Literal["sgd", "momentum", "adam", "rmsprop", "sparse", "lbfgs", "data", "no_grad"] = (
        "sgd"
    )
    """`data`: `p.data.add_(…)`; `no_grad`: `p.sub_(…)`, both without an optimizer."""
    layers: tuple[str, ...] = ("a", "b")
    closure: bool = False

    @property
    def by_hand(self) -> bool:
        """Whether the script itself changes the weights."""
        return self.kind in ("data", "no_grad")


@dataclass(frozen=True)
class Clip:
    """One clipping of gradients."""

    kind: Literal["norm", "infinity", "value", "hand", "data", "strict"] = "norm"
    """`infinity`: by the largest element; `hand`: multiplied in place; `data`: the same through
    `.data`, which counts no version; `strict`: by norm, with an error where it is not finite, after
    which the batch is dropped."""
    over: Literal["all", "own", "first"] = "all"
    """Every parameter of the models, the stepping optimizer's, or the first layer's."""
    tight: bool = True
    """Whether the limit is below the usual norm."""
    when: Literal["before", "after", "each"] = "before"
    """Before the step, after it, or after each micro-batch."""


@dataclass(frozen=True, repr=False)
class Loop:
    """A training loop. The defaults are the textbook's."""

    seed: int = 0
    iterations: int = 3
    nets: tuple[tuple[str, ...], ...] = (("a", "b"),)
    """Layers of each model; the models follow one another."""
    optimizers: tuple[Optimizer, ...] = (Optimizer(),)
    rounds: Literal["joint", "alternate"] = "joint"
    """One backward for all optimizers, or one for each."""
    zero: Literal["start", "before backward", "end", "never"] = "start"
    zero_by: Literal["optimizer", "model", "hand", "data"] = "optimizer"
    """`hand`: `p.grad = None` or `p.grad.zero_()`; `data`: `p.grad.data.zero_()`."""
    set_to_none: bool = True
    micro_batches: int = 1
    losses: int = 1
    """Losses of each micro-batch, each with its own backward pass."""
    gradients: Literal["backward", "autograd", "assigned"] = "backward"
    """`loss.backward()`, `torch.autograd.backward`, or `torch.autograd.grad` assigned by hand."""
    clips: tuple[Clip, ...] = ()
    skip: Literal["", "before backward", "after backward", "after clip"] = ""
    """Where a bad batch is skipped by hand."""
    skip_at: int = 1
    scaler: Literal["", "scale", "unscale", "divide"] = ""
    """A GradScaler: without `unscale_`, with it, or dividing the loss after it was scaled."""
    overflow_at: int | None = None
    """Iteration whose scaled gradients are infinite."""
    poison_at: int | None = None
    """Iteration whose loss is not a number."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    size: Literal["normal", "huge", "tiny"] = "normal"
    zero_bias: bool = False
    frozen: Literal["", "held", "left out"] = ""
    """The first layer is frozen, and its optimizer holds it or not."""
    unfrozen_at: int | None = None
    unused: bool = False
    empty: bool = False
    sparse: bool = False
    """A sparse embedding, with its own optimizer, which steps first."""
    complex: bool = False
    """A complex parameter."""
    shared: bool = False
    """The second layer has the weight of the first."""
    added_at: int | None = None
    added_late: bool = False
    """The group is added right before the step, after any clipping."""
    idle: Literal["", "unused", "zeroes", "other"] = ""
    """Beside updates by hand an optimizer of the same parameters that never steps: not used at all,
    or only for its `zero_grad`. `other`: one of another model, which is not called."""
    perturbs: bool = False
    """The weights are perturbed for a second backward and restored before the step, as in SAM."""
    replaced_at: int | None = None
    """Iteration at which the last layer is replaced, while its optimizer keeps the old one."""
    evaluates: bool = False
    schedule: bool = False
    stops_early: bool = False
    """The last iteration ends after its backward."""
    measured_every: int = 1
    """Cadence of the gradient norms; it does not change the script."""

    def __repr__(self) -> str:
        """The fields that differ from the textbook loop."""
        fields = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        changed = (f"{name}={value!r}" for name, value, usual in fields if value != usual)
        return f"Loop({', '.join(changed)})"

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of all models, in order."""
        return tuple(layer for net in self.nets for layer in net)

    @property
    def by_hand(self) -> bool:
        """Whether there is no optimizer at all."""
        return any(optimizer.by_hand for optimizer in self.optimizers)

    @property
    def closures(self) -> bool:
        """Whether any optimizer is given a closure."""
        return any(optimizer.closure for optimizer in self.optimizers)


def sensible(loop: Loop) -> bool:
    """Whether the loop can run and is realistic."""
    held = {layer for optimizer in loop.optimizers for layer in optimizer.layers}
    special = loop.added_at is not None or loop.replaced_at is not None
    frozen_layers = {loop.layers[0]} if loop.frozen else set()
    trained = [set(o.layers) - frozen_layers for o in loop.optimizers]
    checks = (
        held <= set(loop.layers),
        all(trained),
        set(loop.layers) - held <= frozen_layers or len(set(loop.layers) - held) <= 1,
        loop.frozen != "left out" or loop.layers[0] not in held,
        loop.frozen != "held" or loop.layers[0] in held,
        loop.unfrozen_at is None or bool(loop.frozen),
        not (loop.by_hand and (len(loop.optimizers) > 1 or loop.scaler or special)),
        not (loop.by_hand and (loop.frozen or loop.schedule)),
        loop.by_hand or not loop.idle,
        not loop.added_late
        or (loop.added_at is not None and loop.rounds == "joint" and not loop.closures),
        not loop.perturbs
        or (
            len(loop.optimizers) == 1
            and loop.zero == "start"
            and loop.micro_batches == loop.losses == 1
            and not (loop.by_hand or loop.closures or loop.skip or loop.scaler or loop.complex)
            and not (loop.sparse or special or loop.frozen or loop.shared or loop.stops_early)
            and loop.poison_at is None
            and loop.gradients != "assigned"
            and (loop.dtype, loop.size) == ("float32", "normal")
            and not any(clip.kind == "strict" for clip in loop.clips)
        ),
        not loop.closures
        or (
            loop.micro_batches == 1
            and not loop.skip
            and not loop.scaler
            and loop.gradients != "assigned"
            and loop.zero == "start"
            and (len(loop.optimizers) == 1 or loop.rounds == "alternate")
            and all(clip.when != "each" for clip in loop.clips)
        ),
        all(o.closure for o in loop.optimizers if o.kind == "lbfgs"),
        not any(o.kind == "lbfgs" for o in loop.optimizers)
        or not (loop.size != "normal" or loop.dtype == "bfloat16" or loop.frozen or special),
        loop.rounds == "joint" or len(loop.optimizers) > 1,
        # Where weights are not numbers, an update through `.data` leaves no trace.
        loop.optimizers[0].kind != "data"
        or loop.poison_at is None
        or any(clip.kind == "strict" for clip in loop.clips),
        # It ends where all gradients are 0.
        loop.zero_by != "data" or loop.optimizers[0].kind != "lbfgs" or len(loop.optimizers) == 1,
        # The clipping has zeroed those that wait for another optimizer's step: that the script
        # zeroes them again leaves no trace.
        loop.size != "tiny"
        or loop.zero_by != "data"
        or loop.rounds == "joint"
        or not any(clip.tight for clip in loop.clips),
        # The sum of huge squares is infinite in bfloat16: the clipping zeroes the gradients.
        not (
            loop.clips
            and loop.dtype == "bfloat16"
            and loop.size == "huge"
            and loop.rounds != "joint"
        ),
        not loop.scaler or (loop.dtype == "float32" and loop.size == "normal"),
        loop.scaler or loop.overflow_at is None,
        not (loop.overflow_at is not None and loop.poison_at is not None),
        not (loop.scaler and (loop.gradients == "assigned" or loop.skip)),
        not (loop.scaler and loop.rounds == "alternate" and loop.zero != "start"),
        loop.zero != "never"
        or (not loop.skip and all(clip.when == "before" for clip in loop.clips)),
        not (loop.gradients == "assigned" and (loop.micro_batches > 1 or loop.losses > 1)),
        not (loop.gradients == "assigned" and loop.skip.startswith("after")),
        loop.micro_batches == 1 or loop.zero != "before backward" or not loop.skip,
        not (loop.shared and len(loop.nets[0]) < 2),
        not (loop.shared and (special or loop.frozen)),
        not (loop.replaced_at is not None and len(loop.nets[-1]) < 2),
        not (loop.added_at is not None and loop.replaced_at is not None),
        not (special and loop.gradients == "assigned"),
        not (loop.skip and loop.skip_at >= loop.iterations - 1),
        # A gradient of bfloat16 times 1e-25 underflows, and one times 1e20 twice overflows.
        not (loop.size != "normal" and any(c.kind != "norm" for c in loop.clips)),
        not (loop.size != "normal" and (loop.skip or loop.poison_at is not None)),
        not (loop.size != "normal" and any(o.kind not in ("sgd", "adam") for o in loop.optimizers)),
        not (loop.scaler and shares_parameters(loop)),
        loop.replaced_at is None
        or all(set(o.layers) - {loop.layers[-1]} - frozen_layers for o in loop.optimizers),
        not any(c.kind == "strict" for c in loop.clips)
        or (
            len(loop.clips) == 1
            and loop.clips[0].when == "before"
            and not loop.closures
            and not loop.scaler
            and not loop.skip
            and loop.zero in ("start", "before backward")
            and loop.size == "normal"
        ),
        not loop.stops_early or not (loop.closures or loop.skip or loop.scaler),
        not loop.sparse
        or (
            loop.rounds == "joint"
            and not (loop.closures or loop.by_hand or loop.scaler or special or loop.shared)
            and loop.gradients != "assigned"
            and loop.dtype == "float32"
            and loop.size == "normal"
            and not any(c.over == "all" for c in loop.clips)
            and (loop.set_to_none or loop.zero == "never")
            and loop.zero_by != "data"
        ),
        not loop.complex
        or (
            not (loop.clips or loop.scaler or loop.by_hand or loop.dtype != "float32")
            and loop.size == "normal"
            and loop.gradients != "assigned"
            and not loop.closures
        ),
        loop.skip != "after clip" or any(c.when == "before" for c in loop.clips),
        # The first layer has its own round only where its optimizer does.
        all(c.over != "first" or loop.layers[0] in held for c in loop.clips),
        # PyTorch's clip_grad_value_ fails where there is no gradient at all.
        not (loop.frozen and any(c.over == "first" for c in loop.clips)),
        loop.gradients != "assigned"
        or loop.rounds == "joint"
        or not any(c.kind == "value" and c.over == "first" for c in loop.clips),
    )
    return all(checks)


def shares_parameters(loop: Loop) -> bool:
    """Whether several optimizers hold one parameter."""
    held = [layer for optimizer in loop.optimizers for layer in optimizer.layers]
    return len(held) > len(set(held)) or (loop.shared and len(loop.optimizers) > 1)


# ---------------------------------------------------------------- drawing


RARE = (
    *("", "", "", "skip", "skip", "scaler", "scaler", "numbers", "numbers", "frozen", "unused"),
    *("empty", "shared", "added", "replaced", "poison", "assigned", "zero bias", "sparse"),
    *("complex", "strict", "stop", "cadence", "perturbs"),
)
"""Rare features; a loop has at most one of them."""


def some(*values: object) -> st.SearchStrategy[object]:
    """Mostly the first value, to which hypothesis shrinks."""
    return st.sampled_from([values[0]] * 3 + list(values[1:]))


@st.composite
def loops(draw: st.DrawFn) -> Loop:
    """Any loop, including loops that are not sensible."""
    structure = draw(
        st.sampled_from(
            (
                ((("a", "b"),), (("a", "b"),)),
                ((("a", "b", "c"),), (("a", "b", "c"),)),
                ((("a", "b"),), (("a",), ("b",))),
                ((("a", "b"),), (("a", "b"), ("b",))),
                ((("a", "b"),), (("b",),)),
                ((("a", "b"), ("c",)), (("a", "b", "c"),)),
                ((("a", "b"), ("c",)), (("a", "b"), ("c",))),
                ((("a",), ("b",), ("c",)), (("a",), ("b",), ("c",))),
                ((("a", "b"), ("c",)), (("a", "b"), ("b", "c"))),
            )
        )
    )
    nets, held = structure
    kinds = ("sgd", "momentum", "adam", "rmsprop")
    one = draw(st.sampled_from(("optimizer", "optimizer", "optimizer", "closure", "lbfgs", "hand")))
    made: list[Optimizer] = []
    for layers in held:
        kind = draw(some(*kinds))
        if one == "lbfgs":
            kind = "lbfgs"
        if one == "hand" and len(held) == 1:
            kind = draw(st.sampled_from(("data", "no_grad")))
        made.append(Optimizer(kind, layers, closure=one in ("closure", "lbfgs")))  # type: ignore[arg-type]
    iterations = draw(st.integers(2, 5))
    when = st.integers(1, iterations - 1)
    clips = draw(
        st.lists(
            st.builds(
                Clip,
                some("norm", "infinity", "value", "hand", "data"),  # type: ignore[arg-type]
                some("all", "own", "first"),  # type: ignore[arg-type]
                st.booleans(),
                some("before", "after", "each"),  # type: ignore[arg-type]
            ),
            max_size=2,
        )
    )
    rare = draw(st.sampled_from(RARE))
    loop = Loop(
        seed=draw(st.integers(0, 3)),
        iterations=iterations,
        nets=nets,
        optimizers=tuple(made),
        rounds=draw(st.sampled_from(("joint", "alternate"))) if len(made) > 1 else "joint",
        zero=draw(some("start", "before backward", "end", "never")),  # type: ignore[arg-type]
        zero_by=draw(some("optimizer", "model", "hand", "data")),  # type: ignore[arg-type]
        set_to_none=draw(some(True, False)),  # type: ignore[arg-type]
        micro_batches=draw(some(1, 2, 3)),  # type: ignore[arg-type]
        losses=draw(some(1, 2)),  # type: ignore[arg-type]
        gradients="assigned" if rare == "assigned" else draw(some("backward", "autograd")),  # type: ignore[arg-type]
        clips=tuple(clips),
        evaluates=draw(some(False, True)),  # type: ignore[arg-type]
        schedule=draw(some(False, True)),  # type: ignore[arg-type]
        shared=rare == "shared",
        unused=rare == "unused",
        empty=rare == "empty",
        zero_bias=rare == "zero bias",
        sparse=rare == "sparse",
        complex=rare == "complex",
        perturbs=rare == "perturbs",
        idle=draw(st.sampled_from(("", "unused", "zeroes", "other"))) if one == "hand" else "",  # type: ignore[arg-type]
        added_late=rare == "added" and draw(st.booleans()),
        stops_early=rare == "stop",
        measured_every=draw(st.integers(2, 3)) if rare == "cadence" else 1,
        poison_at=draw(when) if rare in ("poison", "strict") else None,
        added_at=draw(when) if rare == "added" else None,
        replaced_at=draw(when) if rare == "replaced" else None,
    )
    change: dict[str, object] = {}
    if rare == "skip":
        change["skip"] = draw(st.sampled_from(("before backward", "after backward", "after clip")))
        change["skip_at"] = draw(st.integers(0, iterations - 1))
    if rare == "strict":
        change["clips"] = (Clip("strict", draw(some("all", "own")), draw(st.booleans())),)  # type: ignore[arg-type]
        change["zero"] = draw(some("start", "before backward"))
    if rare == "scaler":
        change["scaler"] = draw(st.sampled_from(("unscale", "scale", "divide")))
        change["overflow_at"] = draw(st.none() | when)
    if rare == "numbers":
        change["dtype"] = draw(st.sampled_from(("float64", "bfloat16", "float32")))
        change["size"] = draw(st.sampled_from(("normal", "huge", "tiny")))
    if rare == "frozen":
        change["frozen"] = "held" if nets[0][0] in held[0] else "left out"
        change["unfrozen_at"] = draw(st.none() | when)
    return fitted(dataclasses.replace(loop, **change))  # type: ignore[arg-type]


def fitted(loop: Loop) -> Loop:
    """The nearest loop without incompatible features."""
    change: dict[str, object] = {}
    if loop.closures:
        change |= {"micro_batches": 1, "zero": "start", "skip": "", "scaler": ""}
        change |= {"overflow_at": None}
        change["clips"] = tuple(c for c in loop.clips if c.when != "each")
        if len(loop.optimizers) > 1:
            change["rounds"] = "alternate"
    if loop.gradients == "assigned":
        change |= {"micro_batches": 1, "losses": 1}
    if loop.zero == "never" and (loop.skip or any(c.when != "before" for c in loop.clips)):
        change["zero"] = "end"
    if loop.scaler and loop.rounds == "alternate":
        change["zero"] = "start"
    if loop.size != "normal":
        change["clips"] = tuple(c for c in loop.clips if c.kind == "norm")
    if loop.sparse:
        change |= {"rounds": "joint", "set_to_none": True}
        change["clips"] = tuple(c for c in loop.clips if c.over != "all")
    if loop.complex:
        change["clips"] = ()
    if loop.perturbs:
        change |= {"zero": "start", "micro_batches": 1, "losses": 1}
    if not loop.by_hand:
        change["idle"] = ""
    if loop.rounds != "joint" or loop.closures:
        change["added_late"] = False
    if loop.by_hand:
        change |= {"added_late": False}
        change |= {"schedule": False, "scaler": "", "overflow_at": None, "frozen": ""}
        change |= {"unfrozen_at": None, "added_at": None, "replaced_at": None}
    return dataclasses.replace(loop, **change)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the script


def script_of(loop: Loop) -> str:
    """Python that trains as `loop` says, with `truth` among its names."""
    return "\n".join([*_models(loop), *_optimizers(loop), *_training(loop), "truth.end()", ""])


def standalone(loop: Loop, notes: str = "") -> str:
    """The same as a program that prints its truth. `notes`: comments at its top."""
    remarks = "".join(f"# {line}\n" for line in [repr(loop), *notes.splitlines()])
    source = Path(__file__).with_name("truth.py").read_text(encoding="utf-8")
    body = source.partition("from __future__ import annotations\n")[2]
    tail = "for each in [*truth.steps, *truth.skipped]:\n    print(each)\n"
    start = "\n\ntruth = Truth()  # Silence(): nothing but the training\n"
    ending = f"if isinstance(truth, Truth):\n{indent(tail, '    ')}"
    head = f"{remarks}from __future__ import annotations\n"
    return f"{head}{body}{start}{script_of(loop)}{ending}"


def silent(loop: Loop) -> str:
    """The same as a program that only trains."""
    return standalone(loop).replace("truth = Truth()", "truth = Silence()")


def _models(loop: Loop) -> list[str]:
    lines = [
        "import torch",
        "from torch import nn",
        f"torch.manual_seed({loop.seed})",
        "torch.set_num_threads(1)",
        "nets = {}",
    ]
    for number, layers in enumerate(loop.nets):
        first, last = number == 0, number == len(loop.nets) - 1
        extra: list[str] = []
        if first and loop.unused:
            extra.append(f"self.unused = nn.Linear({WIDTH}, {WIDTH})")
        if first and loop.empty:
            extra.append("self.empty = nn.Parameter(torch.empty(0))")
        if first and loop.sparse:
            extra.append(f"self.table = nn.Embedding(9, {WIDTH}, sparse=True)")
        if first and loop.complex:
            extra.append(f"self.turn = nn.Parameter(torch.randn({WIDTH}, dtype=torch.cfloat))")
        if first and loop.shared:
            extra.append(f"self.{layers[1]}.weight = self.{layers[0]}.weight")
        lines += [
            f"class Net{number + 1}(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            f"        self.order = {list(layers)}",
            *(f"        self.{layer} = nn.Linear({WIDTH}, {WIDTH})" for layer in layers),
            *(f"        {line}" for line in extra),
            "    def forward(self, x):",
            *(
                ["        x = x + self.table(torch.arange(len(x)) * 2)"]
                if first and loop.sparse
                else []
            ),
            *(["        x = (x * self.turn).real"] if first and loop.complex else []),
            "        for name in self.order:",
            "            layer = getattr(self, name)",
            "            x = torch.tanh(layer(x.to(layer.weight.dtype)))",
            *(
                ["        return x"]
                if not last
                else ["        return x.float() if x.dtype == torch.bfloat16 else x"]
            ),
            f"net{number + 1} = nets['net{number + 1}'] = Net{number + 1}()",
        ]
        if loop.dtype != "float32":
            lines.append(f"net{number + 1}.to(torch.{loop.dtype})")
    if loop.zero_bias:
        lines.append(f"nn.init.zeros_({_path(loop, loop.layers[-1])}.bias)")
    if loop.frozen:
        lines.append(f"{_path(loop, loop.layers[0])}.requires_grad_(False)")
    return lines


def _path(loop: Loop, layer: str) -> str:
    number = next(i for i, layers in enumerate(loop.nets) if layer in layers)
    return f"net{number + 1}.{layer}"


def _parameters(loop: Loop, layers: Iterable[str]) -> str:
    return f"[{', '.join(f'*{_path(loop, layer)}.parameters()' for layer in layers)}]"


MADE = {
    "sgd": "torch.optim.SGD({}, lr={})",
    "momentum": "torch.optim.SGD({}, lr={}, momentum=0.9)",
    "adam": "torch.optim.Adam({}, lr={})",
    "rmsprop": "torch.optim.RMSprop({}, lr={})",
    "sparse": "torch.optim.SparseAdam({}, lr={})",
    "lbfgs": "torch.optim.LBFGS({}, lr={}, max_iter=3)",
    "data": "ByHand({})",
    "no_grad": "ByHand({})",
}
RATES = {"sgd": 0.05, "momentum": 0.05, "adam": 0.01, "rmsprop": 0.01}
RATES |= {"sparse": 0.01, "lbfgs": 0.5}


def _rate(loop: Loop, kind: str) -> float:
    if loop.size == "huge" and kind == "sgd":
        return 1e-22
    return RATES.get(kind, 0.05)


def _optimizers(loop: Loop) -> list[str]:
    lines: list[str] = []
    for number, optimizer in enumerate(loop.optimizers):
        given = _parameters(loop, optimizer.layers)
        if number == 0:
            more = [f"*net1.{name}" for name in ("unused.parameters()",) if loop.unused]
            more += ["net1.empty"] if loop.empty else []
            more += ["net1.turn"] if loop.complex else []
            given = f"{given[:-1]}, {', '.join(more)}]" if more else given
        if loop.shared:
            given = f"list(dict.fromkeys({given}))"
        made = MADE[optimizer.kind].format(given, _rate(loop, optimizer.kind))
        lines.append(f"optimizer{number + 1} = {made}")
    names = ", ".join(f"optimizer{i + 1}" for i in range(len(loop.optimizers)))
    if loop.sparse:
        lines.append(
            f"optimizer0 = {MADE['sparse'].format('[net1.table.weight]', RATES['sparse'])}"
        )
        names = f"optimizer0, {names}"
    lines.append(f"optimizers = [{names}]")
    lines.append("truth.watch(nets, optimizers)")
    if loop.idle == "other":
        lines.append("idle = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)")
    elif loop.idle:
        lines.append(
            "idle = torch.optim.Adam([p for net in nets.values() for p in net.parameters()])"
        )
    if loop.scaler:
        lines.append("scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)")
    if loop.schedule:
        lines.append(
            "schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]"
        )
    lines += [
        "def objective(x, *nets):",
        "    for net in nets:",
        "        x = net(x)",
        f"    return (x - 0.5).pow(2).mean() * {SIZES[loop.size]}",
    ]
    return [line for line in lines if line]


def _training(loop: Loop) -> list[str]:
    body: list[str] = []
    if loop.unfrozen_at is not None:
        first = _path(loop, loop.layers[0])
        lines = [f"{first}.requires_grad_(True)"]
        if loop.frozen == "left out":
            lines.append(f"optimizer1.add_param_group({{'params': list({first}.parameters())}})")
        body += [f"if iteration == {loop.unfrozen_at}:", *_in(lines)]
    if loop.added_at is not None and not loop.added_late:
        body += _added(loop)
    if loop.replaced_at is not None:
        last = _path(loop, loop.layers[-1])
        lines = [f"{last} = nn.Linear({WIDTH}, {WIDTH}).to({last}.weight.dtype)"]
        body += [f"if iteration == {loop.replaced_at}:", *_in(lines)]
    everyone = list(range(len(loop.optimizers)))
    rounds = [everyone] if loop.rounds == "joint" else [[number] for number in everyone]
    for place, members in enumerate(rounds):
        body += _round(loop, members, first=place == 0)
    if loop.schedule:
        body += ["for schedule in schedules:", "    schedule.step()"]
    if loop.evaluates:
        body += [
            "with torch.no_grad():",
            f"    objective(torch.ones(2, {WIDTH}), *nets.values())",
        ]
    return [f"for iteration in range({loop.iterations}):", *_in(body)]


def _added(loop: Loop) -> list[str]:
    lines = [
        f"net1.new = nn.Linear({WIDTH}, {WIDTH}).to(next(net1.parameters()).dtype)",
        "net1.order.append('new')",
        "optimizer1.add_param_group({'params': list(net1.new.parameters()), 'lr': 0.003})",
    ]
    return [f"if iteration == {loop.added_at}:", *_in(lines)]


def _in(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _round(loop: Loop, members: list[int], first: bool) -> list[str]:
    if any(loop.optimizers[number].closure for number in members):
        return _closure_round(loop, members[0])
    zero = _zero(loop, members)
    lines: list[str] = []
    if loop.zero == "start":
        lines += zero
    micro: list[str] = [f"x = torch.randn(3, {WIDTH})"]
    if first and loop.skip == "before backward":
        micro += _losses(loop)[0]
        chosen = " and micro == 0" if loop.micro_batches > 1 else ""
        micro += [f"if iteration == {loop.skip_at}{chosen}:", "    continue"]
        if loop.zero == "before backward":
            micro += zero
        micro += _backward(loop, members, again=False)
    else:
        if loop.zero == "before backward":
            micro += _losses(loop)[0]
            if loop.micro_batches > 1:
                micro += ["if micro == 0:", *_in(zero)]
            else:
                micro += zero
            micro += _backward(loop, members, again=False)
        else:
            micro += _backward(loop, members, again=True)
    micro += _clips(loop, members, "each", ("all", "own", "first"))
    if loop.micro_batches > 1:
        lines += [f"for micro in range({loop.micro_batches}):", *_in(micro)]
    else:
        lines += micro
    if loop.scaler == "unscale":
        for number in members:
            lines += [f"scaler.unscale_(optimizer{number + 1})"]
        lines += ["truth.loss_scale = 1.0"]
    if first and loop.skip == "after backward":
        lines += _skip(loop, zero)
    if first and loop.stops_early:
        lines += [f"if iteration == {loop.iterations - 1}:", "    break"]
    if loop.perturbs:
        lines += [
            "kept = [p.detach().clone() for p in net1.parameters()]",
            "with torch.no_grad():",
            "    for p in net1.parameters():",
            "        p.add_(p.grad if p.grad is not None else 0.0, alpha=0.1)",
            *zero,
            *_backward(loop, members, again=True),
            "with torch.no_grad():",
            "    for p, old in zip(net1.parameters(), kept):",
            "        p.copy_(old)",
        ]
    lines += _clips(loop, members, "before", ("all", "first"))
    if first and loop.skip == "after clip":
        lines += _skip(loop, zero)
    if loop.added_late:
        lines += _added(loop)
    for number in members:
        lines += _clips(loop, [number], "before", ("own",))
        if loop.sparse and number == members[0]:
            lines += ["with truth.step(optimizer0):", "    optimizer0.step()"]
        lines += _step(loop, number)
    if loop.scaler:
        lines += ["scaler.update()"]
    lines += _clips(loop, members, "after", ("all", "own", "first"))
    if loop.zero == "end":
        lines += zero
    return lines


def _skip(loop: Loop, zero: list[str]) -> list[str]:
    lines = [*zero]
    if loop.scaler:
        lines.append("scaler.update()")
    return [f"if iteration == {loop.skip_at}:", *_in([*lines, "continue"])]


def _zero(loop: Loop, members: list[int]) -> list[str]:
    flag = "" if loop.set_to_none else "set_to_none=False"
    by_hand = loop.by_hand or loop.zero_by in ("hand", "data")
    lines: list[str] = []
    zeroed = "truth.zeroed()"
    if loop.zero_by == "model":
        lines = ["for net in nets.values():", f"    net.zero_grad({flag})"]
    elif loop.idle == "zeroes" and loop.zero_by not in ("hand", "data"):
        lines = [f"idle.zero_grad({flag})"]
    elif by_hand:
        zeroed = "truth.zeroed(by_hand=True)"
        for number in [*([-1] if loop.sparse else []), *members]:
            inner = "p.grad is None or p.grad.zero_()"
            if loop.zero_by == "data":
                inner = "p.grad is None or p.grad.data.zero_()"
            elif loop.set_to_none:
                inner = "p.grad = None"
            lines += [
                f"for group in optimizer{number + 1}.param_groups:",
                "    for p in group['params']:",
                f"        {inner}",
            ]
    else:
        lines = [f"optimizer{number + 1}.zero_grad({flag})" for number in members]
        if loop.sparse:
            lines = ["optimizer0.zero_grad()", *lines]
    return [*lines, zeroed]


def _losses(loop: Loop) -> tuple[list[str], list[str]]:
    """Lines that compute the losses; their names."""
    share = f" / {loop.micro_batches}" if loop.micro_batches > 1 and loop.scaler != "divide" else ""
    lines, names = [], []
    for number in range(loop.losses):
        name = "loss" if loop.losses == 1 else f"loss{number + 1}"
        weight = share if number == 0 else f" * 0.5{share}"
        lines.append(f"{name} = objective(x, *nets.values()){weight}")
        names.append(name)
    bad: list[str] = []
    if loop.overflow_at is not None:
        bad += [
            f"if iteration == {loop.overflow_at}:",
            f"    {names[0]} = {names[0]} * float('inf')",
        ]
    if loop.poison_at is not None:
        bad += [f"if iteration == {loop.poison_at}:", f"    {names[0]} = {names[0]} * float('nan')"]
    return [*lines, *bad], names


def _backward(loop: Loop, members: list[int], again: bool) -> list[str]:
    lines, names = _losses(loop)
    lines = list(lines) if again else []
    share = f" / {loop.micro_batches}" if loop.micro_batches > 1 else ""
    weights = [share if n == 0 else f" * 0.5{share}" for n in range(loop.losses)]
    bad = loop.overflow_at is not None or loop.poison_at is not None
    check = not bad and not loop.complex
    scaled = ", scaled=True" if loop.scaler else ""
    if loop.scaler:
        lines.append("truth.loss_scale = scaler.get_scale()")

    def context(which: list[int]) -> str:
        given = ", ".join(names[n] + (share if loop.scaler == "divide" else "") for n in which)
        total = " + ".join(f"objective(x.double(), *nets){weights[n]}" for n in which)
        recompute = f", again=lambda *nets: {total}" if check else ""
        replaces = ", replaces=True" if loop.gradients == "assigned" else ""
        return f"with truth.backward({given}{scaled}{replaces}{recompute}):"

    def tensor(n: int) -> str:
        if not loop.scaler:
            return names[n]
        made = f"scaler.scale({names[n]})"
        return f"({made}{share})" if loop.scaler == "divide" and share else made

    if loop.gradients == "assigned":
        layers = [layer for number in members for layer in loop.optimizers[number].layers]
        lines += [
            f"wanted = [p for p in dict.fromkeys({_parameters(loop, layers)}) if p.requires_grad]",
            context([0]),
            f"    found = torch.autograd.grad({tensor(0)}, wanted, allow_unused=True)",
            "    for p, g in zip(wanted, found):",
            "        p.grad = g",
        ]
        return lines
    if loop.gradients == "autograd":
        tensors = ", ".join(tensor(n) for n in range(loop.losses))
        lines += [context(list(range(loop.losses))), f"    torch.autograd.backward([{tensors}])"]
        return lines
    for n in range(loop.losses):
        lines += [context([n]), f"    {tensor(n)}.backward()"]
    return lines


LIMITS = {True: 0.05, False: 1e6}


def _clips(loop: Loop, members: list[int], when: str, over: tuple[str, ...]) -> list[str]:
    lines: list[str] = []
    for clip in loop.clips:
        if clip.when != when or clip.over not in over:
            continue
        if clip.over == "own":
            layers = [layer for number in members for layer in loop.optimizers[number].layers]
            parameters = f"list(dict.fromkeys({_parameters(loop, layers)}))"
        elif clip.over == "first":
            parameters = f"list({_path(loop, loop.layers[0])}.parameters())"
        else:
            parameters = "[p for net in nets.values() for p in net.parameters()]"
        limit = LIMITS[clip.tight] * SIZES[loop.size]
        lines.append(f"clipped = {parameters}")
        if clip.kind in ("hand", "data"):
            gradient = "p.grad" if clip.kind == "hand" else "p.grad.data"
            factor = 0.25 if clip.tight else 1.0
            lines += [
                f"with truth.clip('{clip.kind}', clipped):",
                "    for p in dict.fromkeys(clipped):",
                "        if p.grad is not None:",
                f"            {gradient}.mul_({factor})",
            ]
        elif clip.kind == "strict":
            lines += [
                "try:",
                f"    with truth.clip('norm', clipped, {limit}) as call:",
                "        call.total = nn.utils.clip_grad_norm_(",
                f"            clipped, {limit}, error_if_nonfinite=True",
                "        )",
                "except RuntimeError:",
                "    continue",
            ]
        elif clip.kind == "value":
            lines += [
                f"with truth.clip('value', clipped, {limit / 10}):",
                f"    nn.utils.clip_grad_value_(clipped, {limit / 10})",
            ]
        else:
            norm = "" if clip.kind == "norm" else ", float('inf')"
            lines += [
                f"with truth.clip('norm', clipped, {limit}{norm}) as call:",
                f"    call.total = nn.utils.clip_grad_norm_(clipped, {limit}{norm})",
            ]
    return lines


def _step(loop: Loop, number: int) -> list[str]:
    optimizer, name = loop.optimizers[number], f"optimizer{number + 1}"
    if optimizer.by_hand:
        change = {
            "data": "p.data.add_(p.grad, alpha=-0.05)",
            "no_grad": "p.sub_(p.grad, alpha=0.05)",
        }[optimizer.kind]
        return [
            f"with truth.step({name}), torch.no_grad():",
            f"    for p in {name}.param_groups[0]['params']:",
            "        if p.grad is not None:",
            f"            {change}",
        ]
    if loop.scaler:
        return [f"with truth.step({name}, scaler=scaler):", f"    scaler.step({name})"]
    return [f"with truth.step({name}):", f"    {name}.step()"]


def _closure_round(loop: Loop, number: int) -> list[str]:
    name = f"optimizer{number + 1}"
    inner = [
        "truth.evaluation()",
        *_zero(loop, [number]),
        *_backward(loop, [number], again=True),
        *_clips(loop, [number], "before", ("all", "first", "own")),
        "return " + ("loss" if loop.losses == 1 else "loss1 + loss2"),
    ]
    lines = [
        f"x = torch.randn(3, {WIDTH})",
        "def closure():",
        *_in(inner),
        f"with truth.step({name}):",
        f"    {name}.step(closure)",
    ]
    return [*lines, *_clips(loop, [number], "after", ("all", "own", "first"))]
