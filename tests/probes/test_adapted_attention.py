"""Attention layers whose weights are adapted (LoRA, DoRA) or computed: W is what the layer uses.

The adapters are built as PEFT builds them (`base_layer`, `lora_A`, `lora_B`, `scaling`); with PEFT
itself they are tested in tests/integrations.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.trace.support import KeepingRecorder, trace
from tui_trainer.protocol import schema

WIDTH, RANK, SCALE = 8, 2, 0.5


class Lora(nn.Module):
    """As `peft.tuners.lora.Linear`."""

    def __init__(self, base, dora=False):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.scaling = {"default": SCALE}
        self.active_adapters = ["default"]
        self.merged = False
        self.lora_magnitude_vector = nn.ModuleDict()
        if dora:
            self.lora_magnitude_vector["default"] = nn.Linear(1, base.out_features, bias=False)
            with torch.no_grad():
                norms = base.weight.norm(dim=1, keepdim=True)
                self.lora_magnitude_vector["default"].weight.copy_(norms)

    def weight(self):
        change = SCALE * self.lora_B["default"].weight @ self.lora_A["default"].weight
        weight = self.base_layer.weight + change
        if "default" in self.lora_magnitude_vector:
            length = self.lora_magnitude_vector["default"].weight
            weight = length * weight / weight.norm(dim=1, keepdim=True)
        return weight

    def forward(self, x):
        return x @ self.weight().t()


class Attention(nn.Module):
    num_heads = 2

    def __init__(self, adapt=lambda layer: layer):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            layer = nn.Linear(WIDTH, WIDTH, bias=False)
            setattr(self, name, layer if name == "k_proj" else adapt(layer))

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(
            self.q_proj(x), self.k_proj(x), self.v_proj(x)
        )


def weight_norm(layer):
    return nn.utils.parametrizations.weight_norm(layer)


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def spectral_norm(layer):
    return nn.utils.parametrizations.spectral_norm(layer)


def train(adapt, steps=3, traced=True, freeze=True):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(adapt))
    if freeze:
        model[0].k_proj.requires_grad_(False)
    before = {name: weight_of(getattr(model[0], name)) for name in ("q_proj", "k_proj", "v_proj")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    recorder = KeepingRecorder()

    def loop():
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(2, 4, WIDTH)).square().sum().backward()
            optimizer.step()

    if traced:
        trace(loop, recorder=recorder)
    else:
        loop()
    return model, before, recorder


def weight_of(layer):
    if isinstance(layer, Lora):
        return layer.weight().detach().clone()
    if hasattr(layer, "parametrizations"):
        layer = layer.eval()
        found = layer.weight.detach().clone()
        layer.train()
        return found
    if hasattr(layer, "weight_g"):
        return torch._weight_norm(layer.weight_v, layer.weight_g, 0).detach().clone()
    return layer.weight.detach().clone()


@pytest.mark.parametrize(
    "adapt",
    [Lora, lambda layer: Lora(layer, dora=True), weight_norm, old_weight_norm, spectral_norm],
    ids=["lora", "dora", "weight_norm", "old weight_norm", "spectral_norm"],
)
def test_what_the_layer_multiplies_with(adapt):
    model, before, recorder = train(adapt)
    assert [each.layer for each in recorder.info["attention"]] == ["0"]
    values = recorder.rows(schema.ATTENTION)[3]
    now = {name: weight_of(getattr(model[0], name)) for name in before}
    for role in "qkv":
        name = f"{role}_proj"
        assert values[f"0.norm_{role}"] == pytest.approx(now[name].norm().item(), rel=1e-4)
        drift = (now[name] - before[name]).norm() / before[name].norm()
        assert values[f"0.drift_{role}"] == pytest.approx(drift.item(), rel=1e-3, abs=1e-6)
    q, k = now["q_proj"].flatten(), now["k_proj"].flatten()
    cosine = torch.nn.functional.cosine_similarity(q, k, dim=0).item()
    assert values["0.cos_qk"] == pytest.approx(cosine, rel=1e-3, abs=1e-5)
    assert values["0.drift_q"] > 0
    assert values["0.drift_k"] == 0


@pytest.mark.parametrize("adapt", [Lora, weight_norm, spectral_norm])
def test_nothing_of_the_training_changes(adapt):
    plain, _, _ = train(adapt, traced=False)
    traced, _, _ = train(adapt)
    for a, b in zip(plain.state_dict().values(), traced.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_quantized_base_is_named_with_the_reason():
    def quantized(layer):
        made = Lora(layer)
        made.base_layer.weight = nn.Parameter(
            torch.zeros(WIDTH, WIDTH, dtype=torch.int8), requires_grad=False
        )
        made.weight = lambda: made.lora_B["default"].weight @ made.lora_A["default"].weight
        return made

    _, _, recorder = train(quantized)
    assert recorder.info["attention"] == ()
    assert "quantized" in recorder.info["unseen"][schema.ATTENTION]


def test_a_frozen_layer_beside_a_trained_head_is_not_measured():
    def frozen(layer):
        return layer.requires_grad_(False)

    torch.manual_seed(0)
    model = nn.Sequential(Attention(frozen).requires_grad_(False), nn.Linear(WIDTH, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)

    def loop():
        model(torch.randn(2, 4, WIDTH)).sum().backward()
        optimizer.step()

    recorder, _ = trace(loop)
    assert recorder.info["attention"] == ()
