from __future__ import annotations

import math

import pytest
import torch
from tui_trainer.models.vit import PatchEmbedding, ViT

FACE = {
    "classes": 10_575,
    "image_size": 224,
    "patch_size": 14,
    "channels": 3,
    "layers": 12,
    "heads": 6,
    "width": 384,
    "embedding": 512,
}


def small(**changes) -> ViT:
    torch.manual_seed(0)
    shape = {"classes": 5, "image_size": 8, "patch_size": 4, "channels": 3, "layers": 2}
    return ViT(**{**shape, "heads": 2, "width": 16, **changes})


def test_face_s14_has_the_parameters_of_its_shape():
    with torch.device("meta"):
        model = ViT(**FACE)
    block = 4 * (384 * 384 + 384) + 2 * 384 * 4 * 384 + 5 * 384 + 4 * 384
    patches = 3 * 14 * 14 * 384 + 384
    tokens = 257 * 384 + 384
    head = 384 * 512 + 512 + 512 * 10_575 + 10_575
    expected = patches + tokens + 12 * block + 2 * 384 + head
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_face_s14_makes_256_patches_and_512_dimensions():
    model = ViT(**{**FACE, "layers": 1})
    images = torch.randn(2, 3, 224, 224)
    assert model.patch_embedding(images).shape == (2, 256, 384)
    assert model.embed(images).shape == (2, 512)
    assert model(images).shape == (2, 10_575)


@pytest.mark.parametrize(("pooling", "tokens"), [("class", 5), ("mean", 4)])
def test_pooling_decides_on_the_class_token(pooling, tokens):
    model = small(pooling=pooling)
    assert model.position_embedding.shape == (tokens, 16)
    assert model(torch.randn(3, 3, 8, 8)).shape == (3, 5)


def test_patches_are_those_of_the_image_row_by_row():
    embedding = PatchEmbedding(3, 4, 16)
    image = torch.randn(1, 3, 8, 8)
    found = embedding(image)
    weight, bias = embedding.projection.weight.flatten(1), embedding.projection.bias
    for patch, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        pixels = image[0, :, row : row + 4, column : column + 4].flatten()
        torch.testing.assert_close(found[0, patch], weight @ pixels + bias)


def test_order_of_patches_matters():
    model = small(pooling="mean").eval()
    image = torch.randn(1, 3, 8, 8)
    assert not torch.allclose(model(image), model(image.roll(4, dims=3)))


def test_every_token_sees_every_other():
    attention = small().blocks[0].attention
    x = torch.randn(1, 5, 16, requires_grad=True)
    attention(x)[0, 0].sum().backward()
    assert torch.all(x.grad[0].norm(dim=1) > 0)


def test_initialisation():
    torch.manual_seed(0)
    model = ViT(**{**FACE, "classes": 100, "layers": 2})
    for name, parameter in model.named_parameters():
        residual = name.endswith(("W_out.weight", "down.weight"))
        if name == "embedding.weight":
            assert parameter.std().item() == pytest.approx(384**-0.5, rel=0.05)
        elif name.endswith("bias"):
            assert torch.all(parameter == 0)
        elif "norm" not in name:
            expected = 0.02 / math.sqrt(4) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.15), name


def test_patches_must_tile_the_image():
    with pytest.raises(ValueError, match="patches of 3 do not tile"):
        small(patch_size=3)
