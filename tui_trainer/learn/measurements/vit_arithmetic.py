"""The arithmetic of a vision transformer, read from the model itself on the device `meta`."""

from __future__ import annotations

import torch
from torch.utils.data import BatchSampler, SequentialSampler

from tui_trainer.learn.measurement_process import Value
from tui_trainer.models.vit import Block, ViT

IMAGE_SIZE, PATCH_SIZE, OTHER_PATCH_SIZE = 224, 14, 16
WIDTH, LAYERS, HEADS, EMBEDDING = 384, 12, 6, 512
IMAGES, BATCH_SIZE, EPOCHS = 494_149, 128, 40


def measure() -> dict[str, Value]:
    """Build the model on the device `meta`, pass an image, and let a sampler count batches."""
    model, tokens = _model(PATCH_SIZE, LAYERS)
    _, other_tokens = _model(OTHER_PATCH_SIZE, layers=1)
    projection = model.patch_embedding.projection
    block = model.blocks[0]
    assert isinstance(block, Block)
    images = SequentialSampler(range(IMAGES))
    batches = len(BatchSampler(images, BATCH_SIZE, drop_last=True))
    with torch.device("meta"):
        embedded = model.embed(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "side": IMAGE_SIZE // PATCH_SIZE,
        "patches": tokens,
        "numbers": projection.weight[0].numel(),
        "width": projection.weight.shape[0],
        "tokens": model.position_embedding.shape[0],
        "blocks": len(model.blocks),
        "heads": block.attention.heads,
        "head_width": block.attention.W_query.weight.shape[0] // block.attention.heads,
        "pairs": model.position_embedding.shape[0] ** 2,
        "embedding": embedded.shape[1],
        "parameters": sum(
            each.numel() for name, each in model.named_parameters() if "head" not in name
        ),
        "images": IMAGES,
        "batch_size": BATCH_SIZE,
        "batches": batches,
        "left_over": IMAGES - batches * BATCH_SIZE,
        "epochs": EPOCHS,
        "updates": EPOCHS * batches,
        "other_patch_size": OTHER_PATCH_SIZE,
        "other_patches": other_tokens,
        "other_pairs": (other_tokens + 1) ** 2,
    }


def _model(patch_size: int, layers: int) -> tuple[ViT, int]:
    """(ViT with patches of this size, number of patches of an image)."""
    with torch.device("meta"):
        model = ViT(
            classes=10,
            image_size=IMAGE_SIZE,
            patch_size=patch_size,
            channels=3,
            layers=layers,
            heads=HEADS,
            width=WIDTH,
            embedding=EMBEDDING,
        )
        patches = model.patch_embedding(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return model, patches.shape[1]
