"""How the optimizer knows its parameters: `param_groups` holds the same tensor objects."""

from __future__ import annotations

import torch
from torch import nn

from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.measurements.small_models import loss_of, random_batch, small_gpt

SHOWN = ("token_embedding.weight", "blocks.0.attention.W_query.weight", "blocks.1.mlp.down.weight")


def measure() -> dict[str, Value]:
    """Compare the tensors of model and optimizer, step, then replace one in the model only."""
    model = small_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    named = dict(model.named_parameters())
    held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    held_by_id = {id(tensor): tensor for tensor in held}
    values: dict[str, Value] = {
        "parameters": len(named),
        "shared": sum(held_by_id.get(id(each)) is each for each in named.values()),
    }
    for number, name in enumerate(SHOWN, 1):
        tensor = named[name]
        place = next(i for i, each in enumerate(held) if each is tensor)
        values[f"name_{number}"] = name
        values[f"id_{number}"] = f"0x{id(tensor):x}"
        values[f"held_id_{number}"] = f"0x{id(held[place]):x}"

    weight = named[SHOWN[1]]
    identity, address, first = id(weight), weight.data_ptr(), weight[0, 0].item()
    loss_of(model, random_batch()).backward()
    optimizer.step()
    values |= {
        "weight": SHOWN[1],
        "before": first,
        "after": weight[0, 0].item(),
        "same_object": id(model.blocks[0].attention.W_query.weight) == identity,  # type: ignore[union-attr]
        "same_memory": weight.data_ptr() == address,
    }
    return values | _replaced(model, optimizer, held)


def _replaced(
    model: nn.Module, optimizer: torch.optim.Optimizer, held: list[torch.Tensor]
) -> dict[str, Value]:
    """Replace a weight in the model after the optimizer was created, and step."""
    layer = model.get_submodule("blocks.0.attention.W_query")
    assert isinstance(layer, nn.Linear)
    old, new = layer.weight, nn.Parameter(layer.weight.detach().clone())
    layer.weight = new
    optimizer.zero_grad()
    loss_of(model, random_batch()).backward()
    gradient = new.grad
    assert gradient is not None
    before = new.detach().clone()
    optimizer.step()
    in_model = {id(each) for each in model.parameters()}
    return {
        "still_shared": sum(id(each) in in_model for each in held),
        "new_gradient": gradient.norm().item(),
        "new_moved": (new.detach() - before).norm().item(),
        "old_gradient": str(old.grad),
    }
