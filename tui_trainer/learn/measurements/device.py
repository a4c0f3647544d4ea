"""What the device of a tensor determines, and what it does not."""

from __future__ import annotations

import torch

from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.measurements.small_models import loss_of, random_batch, small_gpt
from tui_trainer.models.gpt import GPT

TERMS = 10_000


def measure() -> dict[str, Value]:
    """Put the same model on the CPU and on `meta`, where tensors have a shape and no memory."""
    model, batch = small_gpt(), random_batch()
    weight = model.head.weight
    values: dict[str, Value] = {
        "cpu_device": str(weight.device),
        "cpu_shape": "×".join(map(str, weight.shape)),
        "cpu_type": str(weight.dtype),
        "cpu_address": hex(weight.data_ptr()),
        "cpu_nodes": type(loss_of(model, batch).grad_fn).__name__,
        "same_place": weight.to("cpu") is weight,
        "other_place": weight.to("meta") is weight,
        "mixing": _error_of_mixing(),
    }
    with torch.device("meta"):
        there = small_gpt()
        gpt2 = GPT(vocabulary=50257, block_size=1024, layers=12, heads=12, width=768, bias=True)
    weight = there.head.weight
    loss = loss_of(there, (batch[0].to("meta"), batch[1].to("meta")))
    loss.backward()
    parameters = list(there.parameters())
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    numbers = torch.randn(TERMS)
    return values | {
        "meta_device": str(weight.device),
        "meta_shape": "×".join(map(str, weight.shape)),
        "meta_type": str(weight.dtype),
        "meta_address": hex(weight.data_ptr()),
        "meta_nodes": type(loss.grad_fn).__name__,
        "parameters": len(parameters),
        "gradients_there": sum(
            each.grad is not None and each.grad.device == each.device for each in parameters
        ),
        "states_there": sum(
            optimizer.state[each]["exp_avg"].device == each.device for each in parameters
        ),
        "terms": TERMS,
        "difference": abs(numbers.sum().item() - numbers.cumsum(0)[-1].item()),
        "gpt2_parameters": sum(each.numel() for each in gpt2.parameters()),
        "gpt2_megabytes": sum(each.nbytes for each in gpt2.parameters()) / 1e6,
        "gpt2_stored": sum(each.data_ptr() != 0 for each in gpt2.parameters()),
    }


def _error_of_mixing() -> str:
    try:
        torch.ones(2) + torch.ones(2, device="meta")
    except RuntimeError as error:
        return str(error)
    return ""
