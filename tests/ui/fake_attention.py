"""What a run would answer about its attention layers: of a small GPT, or of a small ViT. torch is
imported with the first request."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from tui_trainer.protocol.attention import AttentionExamination, ExamineAttention

TEXT = "The yield statement is only used when\ndefining a generator function, and is only used"


@cache
def _gpt() -> tuple[Any, Any, Any, tuple[str, ...]]:
    import torch
    from tui_trainer.models.gpt import GPT

    alphabet = tuple(sorted(set(TEXT)))
    tokens = torch.tensor([[alphabet.index(c) for c in TEXT[i : i + 48]] for i in range(4)])
    model = GPT(vocabulary=len(alphabet), block_size=48, layers=4, heads=4, width=32)
    return _perturbed(model), tokens, tokens.roll(-1, 1), alphabet


@cache
def _vit() -> tuple[Any, Any, Any, tuple[str, ...]]:
    import torch
    from tui_trainer.models.vit import ViT

    generator = torch.Generator().manual_seed(1)
    model = ViT(classes=10, image_size=8, patch_size=2, channels=1, layers=4, heads=4, width=32)
    images = torch.randn(4, 1, 8, 8, generator=generator).double()
    return _perturbed(model), images, torch.tensor([3, 1, 4, 1]), tuple("0123456789")


def _perturbed(model: Any) -> Any:
    """In float64, so that what is shown is the same on every processor."""
    import torch

    model.double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.4 if "W_query" in name or "W_key" in name else 0.15
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    return model


def examined_attention(request: ExamineAttention, images: bool = False) -> AttentionExamination:
    """With the rounding errors of float32. Raises InspectionError, as the run would."""
    from tests.inspector.attending import examined

    model, given, targets, names = _vit() if images else _gpt()
    found = examined(model, given, request, targets, () if images else names, names)
    stream = found.residual
    if stream is not None:
        stream = msgspec.structs.replace(stream, difference=5e-8, logit_difference=9e-8)
    return msgspec.structs.replace(found, deviation=2e-7, residual=stream)
