"""Attention of Hugging Face's models as they return it themselves, and their residual streams:
`make test-frameworks` installs transformers."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import pytest
import torch

from tests.inspector.attending import examined
from tui_trainer.protocol.attention import ExamineAttention
from tui_trainer.protocol.heat_map import HeatMapWindow

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "GPT2LMHeadModel": ("GPT2Config", {**SIZES, "n_positions": 16}, True),
    "LlamaForCausalLM": (
        "LlamaConfig",
        {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2},
        True,
    ),
    "BloomForCausalLM": ("BloomConfig", SIZES, True),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 32}, True),
    "BertForMaskedLM": ("BertConfig", {**SIZES, "intermediate_size": 32}, False),
    "ViTForImageClassification": (
        "ViTConfig",
        {**SIZES, "intermediate_size": 32, "image_size": 8, "patch_size": 2, "num_channels": 1},
        True,
    ),
}
"""Model → (configuration, its options, whether the heads of every layer are in the stream)."""


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_attends_as_it_says_itself(name, implementation):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: make test-frameworks")
    transformers = importlib.import_module("transformers")
    configuration, options, heads_listed = MODELS[name]
    if name == "BloomForCausalLM" and implementation == "sdpa":
        pytest.skip("it has one implementation")
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    images = "ViT" in name
    given = torch.randn(2, 1, 8, 8) if images else torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        expected = model(given, output_attentions=True).attentions[1][1, 2]  # (queries, keys)
    model.config._attn_implementation = implementation
    request = ExamineAttention(
        "1.", 2, None, 1, HeatMapWindow(99, 99, reduction="mean"), residual=True
    )
    found = examined(model, given, request)
    assert found.missing == ""
    cells = np.frombuffer(found.map.cells, "<f4").reshape(found.map.rows, found.map.columns)
    np.testing.assert_allclose(cells, expected, rtol=1e-4, atol=1e-6)
    assert (found.grid is not None) == images
    assert len(found.labels) == (0 if images else 7)
    assert found.no_residual == ""
    assert found.residual.difference < 1e-6
    heads = sum(each.kind == "head" for each in found.residual.contributions)
    assert heads == (8 if heads_listed else 0)
    if name != "BertForMaskedLM":
        assert found.residual.no_logit == ""
        assert found.residual.logit_difference < 1e-5
