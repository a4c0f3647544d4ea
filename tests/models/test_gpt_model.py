from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from tui_trainer.models.gpt import GPT


def small(**changes) -> GPT:
    torch.manual_seed(0)
    shape = {"vocabulary": 11, "block_size": 8, "layers": 2, "heads": 2, "width": 16, **changes}
    return GPT(**shape)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_gpt2_has_124_million_parameters():
    shape = {"block_size": 1024, "layers": 12, "heads": 12, "width": 768}
    with torch.device("meta"):
        assert count(GPT(vocabulary=50257, **shape)) == 124_337_664
        assert count(GPT(vocabulary=50257, bias=True, **shape)) == 124_439_808
        # nanoGPT counts without position embeddings and prints 123.59M for its padded vocabulary
        assert count(GPT(vocabulary=50304, **shape)) - 1024 * 768 == 123_587_328


def test_projections_are_separate_and_named():
    names = dict(small().named_parameters())
    for layer in range(2):
        for which in ("W_query", "W_key", "W_value", "W_out"):
            assert names[f"blocks.{layer}.attention.{which}.weight"].shape == (16, 16)


def test_logits_have_a_row_per_position():
    logits = small()(torch.randint(11, (3, 5)))
    assert logits.shape == (3, 5, 11)


def test_head_is_tied_to_the_token_embedding():
    model = small()
    assert model.head.weight is model.token_embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_untrained_loss_is_that_of_a_uniform_guess():
    model = small(width=64)
    tokens = torch.randint(11, (64, 8))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), torch.randint(11, (512,)))
    assert loss.item() == pytest.approx(math.log(11), abs=0.1)


def test_initialisation_is_that_of_gpt2():
    torch.manual_seed(0)
    model = GPT(vocabulary=512, block_size=128, layers=8, heads=4, width=128, bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.all(parameter == 0)
        elif "norm" in name:
            assert torch.all(parameter == 1)
        else:
            residual = name.endswith(("W_out.weight", "down.weight"))
            expected = 0.02 / math.sqrt(16) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < expected / 20, name


def test_no_position_sees_a_later_one():
    model = small()
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])
    # the last position does see the changed one
    assert not torch.equal(before[:, 7], after[:, 7])


def test_attention_equals_the_formula_written_out():
    attention = small().blocks[0].attention
    x = torch.randn(2, 6, 16)
    expected = torch.zeros(2, 6, 16)
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        q, k, v = (
            x @ layer.weight[rows].T
            for layer in (attention.W_query, attention.W_key, attention.W_value)
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        expected[..., rows] = scores.softmax(-1) @ v
    torch.testing.assert_close(attention(x), expected @ attention.W_out.weight.T)


def test_dropout_acts_in_training_only():
    model = small(dropout=0.5)
    tokens = torch.randint(11, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_generate_continues_beyond_a_block_and_draws_from_its_own_generator():
    model = small().eval()
    state = torch.get_rng_state()
    prompt = torch.tensor([[1, 2, 3]])
    texts = [
        model.generate(prompt, 20, vocabulary=5, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert texts[0].shape == (1, 23)
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0][:, :3], prompt)
    assert texts[0][:, 3:].max() < 5  # spare rows of the vocabulary are never drawn


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="16 cannot be divided among 3"):
        small(heads=3)
