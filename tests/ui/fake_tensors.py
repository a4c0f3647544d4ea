"""The tensors of a fake run, and what the run would answer about them."""

from __future__ import annotations

import math

import msgspec

from tests.client.test_autograd import residual
from tests.ui.fake_attention import examined_attention
from tui_trainer.protocol.attention import ExamineAttention
from tui_trainer.protocol.autograd import (
    CheckedEntry,
    CheckGradient,
    DescribeGraph,
    GradientCheck,
    GradientStep,
)
from tui_trainer.protocol.inspection import (
    BeforePhase,
    DescribeUse,
    ExplainUpdate,
    HeldBytes,
    Inspected,
    InspectionRequest,
    InspectionResult,
    ListTensors,
    OfRank,
    OptimizerGroup,
    ParameterUse,
    ReadTensor,
    Summarize,
    TensorData,
    TensorInfo,
    TensorList,
    TensorRef,
    TensorSummary,
    UpdateExplanation,
    UpdateTerm,
)
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.settings import ReadSettings, Setting, SettingList
from tui_trainer.protocol.travel import (
    Curve,
    EstimateCost,
    ExperimentCost,
    ExperimentResult,
    FindLearningRate,
    ReadTimeline,
    Timeline,
    TravelPlace,
    WhatIf,
)

WEIGHT = "blocks.0.attention.W_query.weight"
BIAS = "blocks.0.attention.W_query.bias"
HEAD = "head.weight"
TIMELINE = Timeline(
    (
        *(TravelPlace(step, "snapshot") for step in (0, 8, 12, 16)),
        TravelPlace(12, "edit", "lr=0.0003 clip=0.5"),
        TravelPlace(16, "checkpoint"),
    ),
    20,
    20,
    True,
    44_000_000,
    512 << 20,
)
SETTINGS = SettingList(
    (
        Setting("lr", 6e-4, "cosine schedule"),
        Setting("weight_decay[0]", 0.1, "adamw, 20 parameters"),
        Setting("weight_decay[1]", 0.0, "adamw, 7 parameters"),
        Setting("betas", (0.9, 0.99)),
        Setting("eps", 1e-8),
        Setting("clip", 1.0, "clip_grad_norm_"),
        Setting("batch_size", 32.0),
        Setting("seed", 1337.0, "order of the data"),
    ),
    frozen=6,
    edits=1,
)


ADAMW = {"lr": 6e-4, "betas": "0.9, 0.99", "eps": 1e-8, "foreach": None}
USE = ParameterUse(
    groups=(
        OptimizerGroup("adamw", 0, {**ADAMW, "weight_decay": 0.1}, (WEIGHT, HEAD), 2, 29_040),
        OptimizerGroup("adamw", 1, {**ADAMW, "weight_decay": 0.0}, (BIAS, "norm.weight"), 2, 764),
    ),
    memory=(
        HeldBytes("parameter", "cpu", 4, 119_216),
        HeldBytes("gradient", "cpu", 3, 118_960),
        HeldBytes("state", "cpu", 8, 238_432),
        HeldBytes("buffer", "cpu", 1, 16_384),
        HeldBytes("saved", "cpu", 40, 1_310_720),
    ),
    frozen=("token_embedding.weight",),
    without_optimizer=("temperature",),
    without_gradient=("norm.weight",),
    shared=((HEAD, "decoder.weight"),),
    unused=("norm.weight",),
)


class FakeTensors:
    """A few tensors with visible structure. torch is imported with the first request."""

    def __init__(self) -> None:
        self._made: dict[TensorRef, object] = {}
        self.before: dict[TensorRef, BeforePhase] = {}
        """What tensors were before the last phase."""
        self.images = False
        """Whether attention is that of a ViT."""

    def _tensors(self) -> dict[TensorRef, object]:
        import torch

        if not self._made:
            generator = torch.Generator().manual_seed(3)
            rows, columns = torch.arange(96.0)[:, None], torch.arange(300.0)
            wave = (torch.sin(rows / 9) + torch.cos(columns / 17)) / 20
            weight = wave + torch.randn(96, 300, generator=generator) / 50
            gradient = torch.randn(96, 300, generator=generator) / 900
            gradient[:, :40] = 0.0
            head = torch.randn(12, 20, generator=generator)
            head[3, 4], head[7, 15] = math.nan, math.inf
            self._made = {
                TensorRef(WEIGHT): weight,
                TensorRef(WEIGHT, "gradient"): gradient,
                TensorRef(WEIGHT, "state", "exp_avg"): gradient / 10,
                TensorRef(BIAS): torch.randn(700, generator=generator),
                TensorRef(HEAD): head,
                TensorRef("empty"): torch.empty(0, 3),
            }
        return self._made

    def answer(self, request: InspectionRequest, status: Status) -> Inspected:
        from tui_trainer.inspector.heat_map import heat_map
        from tui_trainer.inspector.tensor_catalog import info_of
        from tui_trainer.inspector.tensor_statistics import statistics_of

        def done(result: InspectionResult) -> Inspected:
            return Inspected(1, "done", result, status.step, status.phase, 3.2)

        tensors = self._tensors()
        if isinstance(request, OfRank):
            answer = self.answer(request.request, status)
            return msgspec.structs.replace(answer, rank=request.rank)
        match request:
            case ListTensors(modules=True):
                output = TensorRef("blocks.0.attention", "output")
                return done(TensorList((TensorInfo(output, (16, 64), "float32", "cpu", 4096),)))
            case ListTensors():
                listed = [info_of(ref, tensor) for ref, tensor in tensors.items()]  # type: ignore[arg-type]
                return done(TensorList(tuple(listed)))
            case Summarize(tensor=ref) if ref in tensors:
                tensor = tensors[ref]
                info: TensorInfo = info_of(ref, tensor)  # type: ignore[arg-type]
                some = bool(info.elements)
                statistics = statistics_of(tensor, request.entries) if request.statistics else None  # type: ignore[arg-type]
                heat = heat_map(tensor, request.window) if request.window and some else None  # type: ignore[arg-type]
                before = self.before.get(ref) if request.statistics else None
                return done(TensorSummary(info, statistics, heat, before))
            case ReadTensor(tensor=ref):
                info = info_of(ref, tensors[ref])  # type: ignore[arg-type]
                data = bytes(tensors[ref].numpy())  # type: ignore[attr-defined]
                half = request.offset or len(data) // 2
                part = data[half:] if request.offset else data[:half]
                return done(TensorData(info, len(data), request.offset, part))
            case DescribeUse():
                return done(USE)
            case CheckGradient(name=name):
                return done(checked_gradient(name))
            case DescribeGraph():
                return done(residual(12))
            case ExamineAttention():
                from tui_trainer.protocol.errors import UserError

                try:
                    return done(examined_attention(request, self.images))
                except UserError as error:
                    return Inspected(1, "failed", message=error.message, hint=error.hint)
            case ExplainUpdate():
                return done(explained_update(request, tensors.get(TensorRef(request.name))))
            case ReadSettings():
                return done(SETTINGS)
            case EstimateCost(experiment=experiment):
                large = isinstance(experiment, WhatIf) and len(experiment.changes) > 1
                return done(ExperimentCost(100, 400.0 if large else 3.7, 42 << 20, 8 << 30))
            case WhatIf(changes=changes):
                name = " ".join(change.text for change in changes)
                curves = tuple(
                    Curve(each, tuple(range(21, 71)), decay(speed))
                    for each, speed in (("present settings", 30.0), (name, 12.0))
                )
                text = "after 50 steps the loss is 0.4663 instead of 0.8133"
                return done(ExperimentResult("step", curves, text))
            case FindLearningRate(low=low, high=high):
                rates = tuple(low * (high / low) ** (n / 39) for n in range(40))
                text = "the loss falls fastest at 0.01; stay well below where it rises"
                curve = Curve("loss", rates, decay(15.0, 40))
                return done(ExperimentResult("learning rate", (curve,), text))
            case ReadTimeline():
                newest = max(status.step, status.ahead or 0)
                return done(msgspec.structs.replace(TIMELINE, now=status.step, newest=newest))
            case Summarize(tensor=ref):
                why = f"{ref.name} has no gradient now: none was computed"
                return Inspected(1, "failed", message=why, hint="pause after backward")
        raise AssertionError(request)


def decay(speed: float, points: int = 50) -> tuple[float, ...]:
    """Losses that fall with some noise."""
    return tuple(2.5 * math.exp(-n / speed) + 0.4 + 0.05 * math.sin(1.7 * n) for n in range(points))


def explained_update(request: ExplainUpdate, tensor: object) -> UpdateExplanation:
    """A step of AdamW, of one entry with its numbers."""
    import torch

    from tui_trainer.inspector.optimizer_updates import UpdateInputs, explain
    from tui_trainer.inspector.tensor_catalog import info_of

    weight = torch.tensor(0.0125)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(weight)], lr=0.01, weight_decay=0.01)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    state = {
        "step": torch.tensor(29.0),
        "exp_avg": torch.tensor(4.2e-4),
        "exp_avg_sq": torch.tensor(1.3e-5),
    }
    inputs = UpdateInputs(group, weight, torch.tensor(-0.0143), state, True)
    found = explain(optimizer, inputs, request.index is not None)
    terms = [UpdateTerm(t.name, t.formula, float(t.values), t.numbers) for t in found.terms]
    return UpdateExplanation(
        tensor=info_of(TensorRef(request.name), tensor),  # type: ignore[arg-type]
        index=request.index,
        optimizer="adamw",
        group=0,
        settings={"lr": 0.01, "betas": "0.9, 0.999", "eps": 1e-8, "weight_decay": 0.01},
        count=30,
        terms=tuple(terms),
        old=float(weight),
        predicted=float(found.new),
        actual=float(found.new) if request.index else None,
        difference=0.0 if request.index else None,
        precision=1.5e-9,
        notes=() if request.index else ("clipping would still change it",),
    )


def checked_gradient(name: str) -> GradientCheck:
    """One right entry and a wrong one."""

    def entry(index: tuple[int, ...], error: float) -> CheckedEntry:
        steps = tuple(
            GradientStep(10.0**-k, 0.25, 0.25 + error, 10.0**-k, max(error, 10.0 ** -(2 * k)))
            for k in range(1, 10)
        )
        return CheckedEntry(index, -0.034, 0.25, steps, 4)

    entries = (entry((5, 53), 1e-9), entry((24, 3), 0.3))
    return GradientCheck(name, "float64", 2.5, entries, 1_200_000, (), ("a note",))
