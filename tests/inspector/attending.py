"""Runs the forward pass of a model under a trace, as a request would, without a training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from tui_trainer.inspector.attention.examine import (
    AttentionExaminer,
    FoundLayer,
    chosen_layer,
    new_trace,
)
from tui_trainer.probes.attention.layers import find_layers
from tui_trainer.protocol.attention import AttentionExamination, ExamineAttention
from tui_trainer.trace.module_calls import SubmoduleCalls
from tui_trainer.trace.parameters import TrackedParameters


def layers_of(model: nn.Module) -> list[FoundLayer]:
    names = [name for name, _ in model.named_parameters()]
    tracked = TrackedParameters(
        "sgd", "", list(model.parameters()), names, [], len(names),
        modules=dict(model.named_modules()), models=[model],
    )  # fmt: skip
    return [FoundLayer(tracked, layer) for layer in find_layers(tracked).layers]


def examined(
    model: nn.Module,
    given: torch.Tensor,
    request: ExamineAttention | None = None,
    targets: torch.Tensor | None = None,
    tokens: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> AttentionExamination:
    """Of one forward pass, and of the cross-entropy of its output with `targets`."""
    request = request or ExamineAttention()
    layers = layers_of(model)
    chosen = chosen_layer(layers, request.layer)
    trace = new_trace(layers, request, chosen.layer.path)
    calls = SubmoduleCalls(trace.called, trace.returned)
    with torch.no_grad():
        with trace:
            assert calls.begin(model)
            try:
                output = model(given)
            finally:
                calls.end()
            if targets is not None:
                F.cross_entropy(output.flatten(0, -2), targets.flatten())
        assert calls.fault is None
        return AttentionExaminer(layers, chosen, request).answer(trace, [given], tokens, classes)
