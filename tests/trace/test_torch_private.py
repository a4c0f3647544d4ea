"""One test for each private name or undocumented behaviour of PyTorch that the tracer relies on."""

from __future__ import annotations

import ast
import importlib
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tui_trainer
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


def test_a_scheduler_knows_those_inside_it():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    parts = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]
    for outer in (
        torch.optim.lr_scheduler.ChainedScheduler(parts),
        torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[3]),
    ):
        assert torch_private.inner_schedulers(outer) == parts
    assert torch_private.inner_schedulers(parts[0]) == []


def test_in_place_operations_raise_the_version_of_a_tensor():
    tensor = torch.zeros(4)
    before = torch_private.version_of(tensor)
    tensor.add_(1)
    tensor[:2].zero_()
    assert torch_private.version_of(tensor) == before + 2
    tensor.data.zero_()
    assert torch_private.version_of(tensor) == before + 2
    assert torch_private.version_of_value(tensor) == before + 2


def test_tensors_of_inference_mode_have_no_version():
    with torch.inference_mode():
        tensor = torch.zeros(4)
    with pytest.raises(RuntimeError):
        torch_private.version_of(tensor)
    assert torch_private.version_of_value(tensor) == 0


def test_views_share_a_storage_whose_address_is_not_used_again_while_it_is_referred_to():
    tensor = torch.zeros(4)
    held = torch_private.storage_of(tensor)
    assert held == torch_private.storage_of(tensor[1:])
    assert held != torch_private.storage_of(tensor.clone())
    del tensor
    others = [torch.zeros(4) for _ in range(64)]
    assert held not in [torch_private.storage_of(other) for other in others]


def test_a_sparse_tensor_has_its_values_before_it_is_coalesced():
    sparse = torch.sparse_coo_tensor([[0, 0, 1]], [1.0, 2.0, 3.0], (4,))
    assert not sparse.is_coalesced()
    assert torch_private.stored_values(sparse).tolist() == [1.0, 2.0, 3.0]


def test_a_module_holds_its_submodules_and_parameters_by_name():
    layer = nn.Linear(2, 2, bias=False)
    outer = nn.Sequential(layer)
    assert torch_private.submodules(outer) == {"0": layer}
    assert torch_private.own_parameters(outer) == {}
    assert torch_private.own_parameters(layer) == {"weight": layer.weight, "bias": None}
    assert torch_private.own_buffers(nn.BatchNorm1d(1)).keys() == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert torch_private.submodules("text") == torch_private.own_parameters(object()) == {}


def test_the_weight_of_the_older_weight_norm_is_computed_from_its_parts():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(3, 4), dim=1)
    v, g, dim = torch_private.weight_norm_of(layer)
    assert (v, g, dim) == (layer.weight_v, layer.weight_g, 1)
    expected = g * v / v.norm(dim=0, keepdim=True)
    torch.testing.assert_close(torch_private.weight_normed(v, g, dim), expected)
    assert torch_private.weight_norm_of(nn.Linear(3, 4)) is None


def test_workers_of_a_data_loader_run_a_function_of_this_module():
    module = importlib.import_module(torch_private.DATA_LOADER_WORKER)
    loader = torch.utils.data.DataLoader([1, 2], num_workers=1)
    processes = []

    class Context:
        """Takes a worker's process in place of starting it."""

        def __getattr__(self, name):
            return getattr(multiprocessing, name)

        def Process(self, target, args):
            processes.append(target)
            raise ZeroDivisionError

    loader._DataLoader__multiprocessing_context = Context()
    with pytest.raises(ZeroDivisionError):
        iter(loader)
    assert [target.__module__ for target in processes] == [module.__name__]


def test_a_mark_is_found_behind_operations_on_the_marked_result():
    weight = torch.ones(3, requires_grad=True)
    scaled = weight.sum() * 8
    assert not torch_private.graph_is_marked(scaled)
    torch_private.mark_graph(scaled)
    assert torch_private.graph_is_marked(scaled)
    assert torch_private.graph_is_marked((scaled / 4).mean() + 1)
    assert not torch_private.graph_is_marked(weight.sum() / 4)
    torch_private.mark_graph(torch.zeros(()))
    assert not torch_private.graph_is_marked(torch.zeros(()))


def test_a_node_tells_its_result_and_what_it_saved():
    x = torch.ones(2, 3, requires_grad=True)
    before = torch_private.next_sequence_number()
    softmax = x.softmax(-1).grad_fn
    assert torch_private.sequence_number(softmax) == before
    assert torch_private.result_of(softmax) == ((2, 3), torch.float32)
    assert torch_private.saved_dim(softmax) % 2 == 1
    assert "dim" in torch_private.saved_names(softmax)
    assert set(torch_private.saved_tensors(softmax)) == {"result"}
    power = x.pow(3).grad_fn
    assert torch_private.has_saved(power, "exponent")
    assert torch_private.saved(power, "exponent") == 3
    assert not torch_private.has_saved(power, "dim")
    assert torch_private.signed((1 << 64) - 1) == -1


def test_functions_within_the_context_call_no_torch_function():
    class Seen(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    with Seen() as seen:
        torch.ones(1).exp()
        outside = seen.calls
        with torch_private.without_torch_function():
            torch.ones(1).exp()
    assert (outside, seen.calls) == (2, 2)


def test_hooks_around_a_forward_are_counted():
    layer = nn.Linear(1, 1)
    layer.register_forward_pre_hook(lambda module, args: None)
    layer.register_forward_hook(lambda module, args, result: None)
    assert torch_private.forward_hooks_of(layer) == 2


def test_tensors_of_a_tree_come_in_its_order():
    a, b = torch.zeros(1), torch.ones(2)
    found = torch_private.tensors_of({"x": [a, "text"], "y": (b, None)})
    assert [id(tensor) for tensor in found] == [id(a), id(b)]


def test_a_plain_tensor_is_its_own_shard():
    weight = nn.Parameter(torch.zeros(2))
    assert not torch_private.is_sharded(weight)
    assert torch_private.local(weight) is weight


def test_a_sharded_tensor_holds_a_local_one(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        whole = torch.arange(4.0)
        sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
        assert torch_private.is_sharded(sharded)
        assert type(torch_private.local(sharded)) is torch.Tensor
        assert torch.equal(torch_private.local(sharded), whole)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("of_softmax", [False, True])
def test_the_graph_of_a_cross_entropy_is_recognised(divided, of_softmax):
    logits = torch.randn(6, 5, requires_grad=True)
    inputs = logits.softmax(-1) if of_softmax else logits * 1
    loss = nn.functional.cross_entropy(inputs, torch.arange(6) % 5)
    found = torch_private.cross_entropy_of(loss / 4 if divided else loss)
    assert found == torch_private.CrossEntropy(5, of_softmax, divided)


def test_another_loss_is_no_cross_entropy():
    outputs = torch.randn(6, 5, requires_grad=True)
    assert torch_private.cross_entropy_of(outputs.square().mean()) is None
    summed = nn.functional.cross_entropy(outputs, torch.arange(6) % 5, reduction="sum")
    assert torch_private.cross_entropy_of(summed) is None


def private_names_of_torch() -> set[str]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer)
    holders = [
        torch.optim.lr_scheduler.ChainedScheduler([constant]),
        torch.zeros(1),
        nn.Linear(1, 1),
        optimizer,
        torch.amp.GradScaler("cpu"),
        torch.utils.data.DataLoader([1]),
        torch.ones(2, requires_grad=True).softmax(0).grad_fn,
        torch.ones(2, requires_grad=True).pow(3).grad_fn,
        torch.ones(2, 2, requires_grad=True).transpose(0, 1).grad_fn,
        torch.ones(2, 2, requires_grad=True).sum(0).grad_fn,
    ]
    return {name for held in holders for name in dir(held) if name[0] == "_" != name[1]}


def uses_of_private_names(path: Path, private: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module=str(name)) if name.startswith("torch.") and "._" in name:
                yield f"{path.name}:{node.lineno} {name}"
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name[0] == "_" != name[1]:
                yield f"{path.name}:{node.lineno} torch.{name}"
            case ast.Attribute(attr=name) if name in private:
                yield f"{path.name}:{node.lineno} {name}"
            case ast.Constant(value=str(name)) if name in private:
                yield f"{path.name}:{node.lineno} {name!r}"


def test_private_names_stand_in_one_module():
    private = private_names_of_torch()
    assert {
        "_schedulers",
        "_version",
        "_values",
        "_parameters",
        "_modules",
        "_scale",
        "_saved_dim",
    } <= private
    package = Path(tui_trainer.__file__).parent
    found = [
        use
        for room in (
            "inspector",
            "integrations",
            "probes",
            "run",
            "settings",
            "tasks",
            "trace",
            "travel",
        )
        for path in sorted((package / room).rglob("*.py"))
        if path.name != "torch_private.py"
        for use in uses_of_private_names(path, private)
    ]
    assert found == []
