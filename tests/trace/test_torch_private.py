"""One test for each private name or undocumented behaviour of PyTorch that the tracer relies on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.trace.support import mlp
from tui_trainer.trace import torch_private
from tui_trainer.trace.torch_private import NormCapture


def with_gradients() -> nn.Module:
    torch.manual_seed(0)
    model = mlp()
    model(torch.randn(4, 6)).square().sum().backward()
    return model


def test_clip_grad_norm_computes_all_norms_in_one_foreach_call():
    model = with_gradients()
    parameters = list(model.parameters())
    expected = torch.stack([p.grad.norm() for p in parameters])
    with NormCapture() as captured:
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
    assert captured.count == 4
    (vector,) = captured.norms_of(parameters, parameters)
    torch.testing.assert_close(vector, expected)
    by_gradient = captured.by_gradient()
    torch.testing.assert_close(torch.stack([by_gradient[id(p.grad)] for p in parameters]), expected)


def test_capture_restores_what_it_replaced():
    before = torch._foreach_norm, torch.linalg.vector_norm
    with NormCapture():
        assert torch._foreach_norm is not before[0]
    assert (torch._foreach_norm, torch.linalg.vector_norm) == before


def test_norms_in_low_precision_are_not_used():
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    with NormCapture() as captured:
        torch.nn.utils.clip_grad_norm_([weight], 0.1)
    assert captured.norms_of([weight], [weight]) is None
    assert captured.by_gradient() == {}


def test_scaler_tells_whether_gradients_are_still_scaled():
    model = with_gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))
    assert float(torch_private.loss_scale(scaler)) == 64.0
    assert float(torch_private.gradient_scale(scaler, optimizer)) == 64.0
    assert float(torch_private.gradient_scale(scaler, None)) == 64.0
    scaler.unscale_(optimizer)
    assert torch_private.gradient_scale(scaler, optimizer) is None
    assert torch_private.gradient_scale(scaler, None) is None
    scaler.step(optimizer)
    scaler.update()
    assert float(torch_private.gradient_scale(scaler, optimizer)) == 64.0


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_hands_found_inf_to_fused_optimizers_alone(fused):
    model = with_gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    flags = []
    optimizer.register_step_pre_hook(lambda o, *_: flags.append(torch_private.skip_flag(o)))
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    (flag,) = flags
    assert (flag is not None) == fused
    if fused:
        assert float(flag) == 0.0
    assert torch_private.skip_flag(optimizer) is None


def test_wrappers_keep_the_model_and_its_names_underneath():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = mlp()
    compiled = torch.compile(model)
    assert torch_private.unwrapped(compiled) is model
    assert torch_private.unwrapped(nn.DataParallel(model)) is model
    assert [torch_private.plain_name(n) for n, _ in compiled.named_parameters()] == [
        n for n, _ in model.named_parameters()
    ]
    wrapped = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
    assert list(wrapped._modules["0"]._modules) == ["_checkpoint_wrapped_module"]
    assert torch_private.plain_name("_fsdp_wrapped_module.0.weight") == "0.weight"


def test_one_kernel_reads_copies_and_subtracts_many_tensors():
    tensors = [torch.randn(3, 4), torch.randn(5)]
    copies = [torch.zeros(3, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)]
    torch_private.copy_each(copies, tensors)
    assert all(torch.equal(a, b.double()) for a, b in zip(copies, tensors, strict=True))
    norms = torch_private.norms_of(tensors, torch.float64)
    assert [norm.dtype for norm in norms] == [torch.float64] * 2
    torch.testing.assert_close(torch.stack(list(norms)), torch.stack([c.norm() for c in copies]))
    torch_private.subtract_each(copies, tensors)
    assert all(not copy.any() for copy in copies)


def test_a_view_knows_its_base():
    tensor = torch.zeros(4)
    assert torch_private.base_of(tensor[:2]) is tensor
    assert torch_private.base_of(tensor) is None


def test_a_module_knows_that_it_is_compiled():
    model = mlp()
    assert not torch_private.is_compiled(model)
    assert torch_private.is_compiled(torch.compile(model))
    model.compile()
    assert torch_private.is_compiled(model)
