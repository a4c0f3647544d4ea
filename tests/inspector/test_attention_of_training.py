"""Attention of a training under the tracer: at every stop, and without changing its result."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from tui_trainer.models.gpt import GPT
from tui_trainer.models.vit import ViT

from tests.inspector.test_inspector import Traced
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.protocol.attention import AttentionExamination, ExamineAttention
from tui_trainer.protocol.heat_map import HeatMapWindow

EVERYTHING = ExamineAttention(
    "1", head=1, sample=1, window=HeatMapWindow(8, 8), weights=True, residual=True
)


def train_gpt() -> tuple[list[torch.Tensor], torch.Tensor]:
    """The weights after three steps, and the state of the random generator."""
    torch.manual_seed(7)
    model = GPT(vocabulary=9, block_size=6, layers=2, heads=2, width=8, dropout=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        tokens, targets = torch.randint(0, 9, (2, 2, 6))
        optimizer.zero_grad()
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()


def train_vit() -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(8)
    model = ViT(classes=3, image_size=4, patch_size=2, channels=1, layers=2, heads=2, width=8,
                pooling="mean", dropout=0.1)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(2, 1, 4, 4)), torch.randint(0, 3, (2,))).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("train", [train_gpt, train_vit])
def test_looking_at_attention_at_every_boundary_changes_no_bit(train):
    alone = train()
    found: list[tuple[str, AttentionExamination]] = []
    refused: list[tuple[int, str]] = []

    def look(inspector, phase, step):
        try:
            found.append((phase, inspector.answer(EVERYTHING)))
        except InspectionError as error:
            refused.append((step, error.message))

    observed = Traced(look).run(train)
    assert torch.equal(alone[1], observed[1])
    assert all(torch.equal(a, b) for a, b in zip(alone[0], observed[0], strict=True))
    assert {step for step, _ in refused} == {1}  # its batch was not kept before anything asked
    assert len(found) > 4
    for phase, each in found:
        assert each.missing == ""
        assert each.no_residual == ""
        assert each.residual.difference < 1e-6
        assert each.residual.correct == (phase not in ("data", "zero_grad", "forward"))
        assert each.residual.logit_difference < 1e-5
        assert len(each.weights) == 2
        after_step = any("after the step" in note for note in each.notes)
        assert after_step == (phase == "step")
