"""Every number that a page states, compared with a second computation.

The second one makes the same model and the same batches from the same seed, and then gets at the
numbers in another way: `torch.autograd.grad` instead of `backward`, formulas instead of optimizers.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tui_trainer.models.gpt import GPT
from tui_trainer.models.vit import ViT

from tests.learn.measured_once import measured
from tui_trainer.learn.catalog import PAGES
from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.measurements import measure_page
from tui_trainer.learn.measurements.small_models import random_batch, small_gpt

SEED = 1
Check = Callable[[dict[str, Value]], None]
CHECKS: dict[str, Check] = {}
OF_THIS_PROCESS = re.compile(r"(held_)?id_\d|.*_address")
"""Names of values that are the places of objects in memory."""


def checks(page: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[page] = check
        return check

    return register


@pytest.fixture(autouse=True)
def _same_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


@pytest.mark.parametrize("page", PAGES)
def test_the_numbers_are_right(page: str) -> None:
    values = Checked(measured(page, SEED).values)
    CHECKS[page](values)
    assert values.unread() == set(), "numbers that no test has looked at"


@pytest.mark.parametrize("page", PAGES)
def test_the_same_seed_gives_the_same_numbers(page: str) -> None:
    first, second = measured(page, SEED).values, measure_page(page, SEED).values
    assert set(first) == set(second)
    for name, value in first.items():
        assert type(second[name]) is type(value)
        if not OF_THIS_PROCESS.fullmatch(name):
            is_number = isinstance(value, float | list)
            assert second[name] == (near(value, rel=1e-3, abs=1e-6) if is_number else value), name


CLAIMS: dict[str, tuple[str, ...]] = {
    "scalar-tensor": ("scalar_nodes > tensor_nodes", "difference < 1e-5"),
    "gradient": ("abs(gradient / slope - 1) < 1e-4",),
    "accumulation": ("halves_cosine > 0.9999", "zeros_moved > 0.01", "none_moved == 0"),
    "forward-backward": (
        "loss_downhill < loss - 0.05 < loss + 0.05 < loss_uphill",
        "abs(loss_random - loss) < 0.02",
        "0.7 < (loss_uphill - loss) / (loss - loss_downhill) < 1.4",
    ),
    "param-groups": ("new_gradient > 0", "abs(after - before) > 0.005"),
    "updates": ("abs(rmsprop_1) > 5 * abs(adam_1)", "abs(adam_1 - adam_big) < 1e-6"),
    "clipping": ("norm > 2 * limit", "value_cosine < 0.99", "cosine > 0.9999"),
    "qkv": (
        "max(gradient_q, gradient_k) < gradient_v / 10",
        "abs(qk_0) < 0.15",
        "abs(gradient_cosine) < 0.5",
        "min(drift_q_2, drift_k_2, drift_v_2) > 0.2",
        "copied_after < 0.98",
    ),
    "attention-scores": ("largest > 0.7 > 0.4 > scaled_largest", "abs(weight_2 - 0.090) < 5e-4"),
    "residual-stream": ("added_norm > 0", "difference < 1e-6"),
}
"""What the texts say of the numbers, whatever the seed."""
SEEDS = int(os.environ.get("TUI_TRAINER_LEARN_SEEDS", "2"))


@pytest.mark.parametrize("page", CLAIMS)
def test_statements_about_the_numbers_hold_with_every_seed(page: str) -> None:
    for seed in range(1, SEEDS + 1):
        values = measured(page, seed).values
        for claim in CLAIMS[page]:
            assert eval(claim, {}, values), (claim, seed, values)


class Checked(dict[str, Value]):
    """Values that note which of them were looked at."""

    def __init__(self, values: dict[str, Value]) -> None:
        super().__init__(values)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Value:
        self._read.add(name)
        return super().__getitem__(name)

    def unread(self) -> set[str]:
        return set(self) - self._read


def near(value: object, rel: float = 1e-4, abs: float = 1e-7) -> object:
    return pytest.approx(value, rel=rel, abs=abs)


def loss_by_hand(model: GPT, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The mean of −log of the probability that the model gives to each right token."""
    inputs, targets = batch
    log_probabilities = model(inputs) - model(inputs).logsumexp(-1, keepdim=True)
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).mean()


def gradient_by_hand(model: GPT, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    gradients = torch.autograd.grad(loss_by_hand(model, batch), list(model.parameters()))
    return torch.cat([each.flatten() for each in gradients])


def reachable(node: object, seen: set[object]) -> set[object]:
    """The nodes of a graph, by recursion."""
    if node is not None and node not in seen:
        seen.add(node)
        for following, _ in node.next_functions:  # type: ignore[attr-defined]
            reachable(following, seen)
    return seen


@checks("loss-graph")
def _(v: dict[str, Value]) -> None:
    model, batch = small_gpt(), random_batch()
    assert v["loss"] == near(loss_by_hand(model, batch).item())
    loss = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    nodes = reachable(loss.grad_fn, set())
    names = [node.name() for node in nodes]  # type: ignore[attr-defined]
    assert v["grad_fn"] == type(loss.grad_fn).__name__ == "NllLossBackward0"
    assert v["operations"] == len(nodes)
    leaves = sum("AccumulateGrad" in name for name in names)
    assert v["leaves"] == leaves
    assert v["parameters"] == len({id(p) for p in model.parameters()}) == leaves
    assert v["item_type"] == "float"
    assert v["detached_operations"] == 0
    assert v["no_grad_operations"] == 0
    # every batch adds its graph, and one node for the addition
    for count, kept in (("batches", "kept"), ("twice_batches", "twice_kept")):
        assert v[kept] == v[count] * (len(nodes) - leaves + 1)  # type: ignore[operator]
    assert v["twice_batches"] == 2 * v["batches"]  # type: ignore[operator]


@checks("accumulation")
def _(v: dict[str, Value]) -> None:
    model, batch = small_gpt(), random_batch(8)
    norm = gradient_by_hand(model, batch).norm().item()
    assert v["norm_once"] == near(norm)
    assert v["norm_twice"] == near(2 * norm)
    assert v["ratio_twice"] == near(2)
    assert v["norm_thrice"] == near(3 * norm)
    assert v["ratio_thrice"] == near(3)
    assert (v["examples"], v["half"]) == (8, 4)
    halves = [
        gradient_by_hand(model, (batch[0][part], batch[1][part]))
        for part in (slice(0, 4), slice(4, 8))
    ]
    together = (halves[0] + halves[1]) / 2
    assert v["whole_norm"] == near(norm)
    assert v["halves_norm"] == near(together.norm().item())
    assert v["halves_cosine"] == near(1)
    assert v["left_none"] == "None"
    assert v["none_moved"] == 0
    assert v["zeros_norm"] == 0
    _adam_after(False)  # the layer that the measurement made first
    assert v["zeros_moved"] == near(_adam_after(True), rel=1e-3)


def _adam_after(zeros: bool) -> float:
    """How far Adam's second step, with a gradient of zeros, moves a layer (Kingma & Ba 2015)."""
    layer, x = torch.nn.Linear(4, 4), torch.randn(8, 4)
    (g,) = torch.autograd.grad((layer(x) ** 2).mean(), layer.weight)
    m, v = 0.9 * 0.1 * g, 0.999 * 0.001 * g**2
    update = 0.1 * (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
    return update.norm().item() if zeros else 0.0


@checks("param-groups")
def _(v: dict[str, Value]) -> None:
    model = small_gpt()
    names = [name for name, _ in model.named_parameters()]
    assert v["parameters"] == v["shared"] == len(names)
    for number in "123":
        assert v[f"name_{number}"] in names
        assert v[f"id_{number}"] == v[f"held_id_{number}"]
    weight = dict(model.named_parameters())[v["weight"]]  # type: ignore[index]
    assert v["before"] == near(weight[0, 0].item())
    g = torch.autograd.grad(loss_by_hand(model, random_batch()), weight)[0][0, 0].item()
    # AdamW's first step: decay, then ±lr, since m̂ / √v̂ is the sign of the gradient
    expected = weight[0, 0].item() * (1 - 0.01 * 0.01) - 0.01 * g / (abs(g) + 1e-8)
    assert v["after"] == near(expected)
    assert v["same_object"] is True
    assert v["same_memory"] is True
    assert v["still_shared"] == len(names) - 1
    assert v["new_gradient"] > 0  # type: ignore[operator]
    assert v["new_moved"] == 0
    assert v["old_gradient"] == "None"


@checks("scalar-tensor")
def _(v: dict[str, Value]) -> None:
    w, x, t = torch.randn(3, 4), torch.randn(4), torch.randn(3)
    rows = [[float(entry) for entry in row] for row in w]
    outputs = [sum(a * float(b) for a, b in zip(row, x, strict=True)) for row in rows]
    loss = sum((y - float(wanted)) ** 2 for y, wanted in zip(outputs, t, strict=True))
    assert v["tensor_loss"] == near(loss)
    assert v["scalar_loss"] == near(loss)
    gradient = 2 * (outputs[0] - float(t[0])) * float(x[0])
    for name in ("tensor_gradient", "scalar_gradient", "by_hand"):
        assert v[name] == near(gradient)
    assert 0 <= v["difference"] < 1e-5  # type: ignore[operator]
    assert (v["rows"], v["columns"], v["entries"]) == (3, 4, 12)
    assert v["more_rows"] == 6
    # leaf, mv, sub, pow, sum
    assert v["tensor_nodes"] == v["more_tensor_nodes"] == 5
    # a row: 4 leaves, 4 products, 3 sums, one difference, one square, one sum of rows
    assert v["scalar_nodes"] == 3 * 14
    assert v["more_scalar_nodes"] == 6 * 14


@checks("gradient")
def _(v: dict[str, Value]) -> None:
    model, batch = small_gpt().double(), random_batch()
    names = [name for name, _ in model.named_parameters()]
    assert v["parameters"] == v["none_before"] == v["none_after_forward"] == len(names)
    assert v["none_after_backward"] == 0
    assert v["weight"] in names
    weight = model.get_parameter("blocks.0.mlp.up.weight")
    assert v["shape"] == v["gradient_shape"] == "128×32"
    (g,) = torch.autograd.grad(loss_by_hand(model, batch), weight)
    row, column = v["entry"]  # type: ignore[misc]
    assert v["gradient"] == near(g[row, column].item(), rel=1e-9)  # type: ignore[index]
    assert abs(v["gradient"]) == near(g.abs().max().item(), rel=1e-9)  # type: ignore[arg-type]
    assert v["h"] == 1e-4
    assert v["slope"] == near(g[row, column].item(), rel=1e-6)  # type: ignore[index]
    assert v["left_after_step"] == len(names)
    assert v["changed_by_step"] == 0


@checks("forward-backward")
def _(v: dict[str, Value]) -> None:
    model, batch = small_gpt(), random_batch()
    parts = ["token_embedding", "blocks.0", "blocks.1", "norm", "head"]
    assert v["forward_order"] == parts
    assert v["backward_order"] == parts[::-1]
    # 2·n·k·m for each matrix product: per block four of C×C and the two of the MLP, the head, and
    # in attention q·kᵀ and weights·v, which the fused kernel of the CPU computes uncounted
    tokens, width, vocabulary = 8 * 16, 32, 32
    products = 2 * (4 * width**2 + 8 * width**2) + width * vocabulary
    assert v["forward_flops"] == near(2 * tokens * products / 1e6)
    assert v["backward_flops"] == near(4 * tokens * products / 1e6)
    assert v["flops_ratio"] == near(2)
    parameters = list(model.parameters())
    assert v["parameters"] == v["changed_by_step"] == len(parameters)
    assert v["changed_by_backward"] == 0
    assert v["learning_rate"] == 0.1
    assert v["loss"] == near(loss_by_hand(model, batch).item())
    g = torch.autograd.grad(loss_by_hand(model, batch), parameters)
    with torch.no_grad():
        for name, sign in (("loss_downhill", -1), ("loss_uphill", 2)):  # 2: back, and up
            for parameter, gradient in zip(parameters, g, strict=True):
                parameter += sign * 0.1 * gradient
            assert v[name] == near(loss_by_hand(model, batch).item())
    size = sum(float((each**2).sum()) for each in g)
    assert v["loss"] - v["loss_downhill"] == near(0.1 * size, rel=0.2)  # type: ignore[operator]
    assert v["loss_uphill"] - v["loss"] == near(0.1 * size, rel=0.2)  # type: ignore[operator]
    # a random direction in ten thousands of dimensions is at a right angle to the gradient
    assert v["loss_random"] == near(v["loss"], rel=0.01)


@checks("updates")
def _(v: dict[str, Value]) -> None:
    lr, beta, decay = (float(v[name]) for name in ("learning_rate", "momentum", "decay"))  # type: ignore[arg-type]
    assert (lr, beta, decay) == (0.1, 0.9, 0.1)
    assert (v["alpha"], v["beta_2"]) == (0.99, 0.999)
    w, g1, g2 = (float(v[name]) for name in ("weight", "first", "second"))  # type: ignore[arg-type]
    drawn = torch.randn(2).tolist()
    assert (w, g1) == near(tuple(drawn))
    assert g2 == near(0.5 * g1 + 0.1 * torch.randn(()).item())
    assert (v["sgd_1"], v["sgd_2"]) == near((-lr * g1, -lr * g2))
    b = beta * g1 + g2
    assert (v["momentum_1"], v["momentum_2"]) == near((-lr * g1, -lr * b))
    assert v["momentum_b"] == near(b)
    s1 = 0.01 * g1**2
    s2 = 0.99 * s1 + 0.01 * g2**2
    rms = [-lr * g / (math.sqrt(s) + 1e-8) for g, s in ((g1, s1), (g2, s2))]
    assert (v["rmsprop_1"], v["rmsprop_2"]) == near(tuple(rms))
    assert v["rmsprop_v"] == near(s2, abs=1e-12)
    m1, q1 = 0.1 * g1, 0.001 * g1**2
    m2, q2 = 0.9 * m1 + 0.1 * g2, 0.999 * q1 + 0.001 * g2**2
    adam = [
        -lr * (m / (1 - 0.9**n)) / (math.sqrt(q / (1 - 0.999**n)) + 1e-8)
        for n, m, q in ((1, m1, q1), (2, m2, q2))
    ]
    assert (v["adam_1"], v["adam_2"]) == near(tuple(adam))
    assert (v["adam_m"], v["adam_v"]) == (near(m2), near(q2, abs=1e-12))
    assert v["decay_1"] == near(-lr * decay * w)
    first = -lr * decay * w + adam[0]
    assert v["adamw_1"] == near(first)
    assert v["adamw_2"] == near(-lr * decay * (w + first) + adam[1])
    assert v["factor"] == 1000
    assert v["sgd_big"] == near(-lr * 1000 * g1)
    assert v["adam_big"] == near(adam[0])


def test_what_clipping_adds_to_the_norm() -> None:
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.full((1,), 1e-6)
    nn.utils.clip_grad_norm_([weight], 1e-6)
    assert weight.grad.item() == near(0.5e-6)


@checks("clipping")
def _(v: dict[str, Value]) -> None:
    model = nn.Linear(2, 1)
    x, t = torch.randn(16, 2), 4 + torch.randn(16, 1)
    error = (x @ model.weight.T + model.bias - t).detach()
    g = [*(2 * error * x).mean(0).tolist(), (2 * error).mean().item()]
    norm = math.hypot(*g)
    assert v["gradient"] == near(g)
    assert v["norm"] == v["returned"] == near(norm)
    assert v["limit"] == 1.0
    assert v["scale"] == near(1 / norm)
    assert v["clipped"] == near([each / norm for each in g], abs=1e-5)
    assert v["clipped_norm"] == near(1)
    assert v["cosine"] == near(1)
    cut = [max(-1.0, min(1.0, each)) for each in g]
    assert v["by_value"] == near(cut)
    dot = sum(a * b for a, b in zip(g, cut, strict=True))
    assert v["value_cosine"] == near(dot / norm / math.hypot(*cut))
    assert v["loose_limit"] == near(2 * norm)
    assert v["loose_norm"] == near(norm)


@checks("device")
def _(v: dict[str, Value]) -> None:
    model = small_gpt()
    assert (v["cpu_device"], v["meta_device"]) == ("cpu", "meta")
    shape = "×".join(map(str, model.token_embedding.weight.shape))
    assert v["cpu_shape"] == v["meta_shape"] == shape
    assert v["cpu_type"] == v["meta_type"] == "torch.float32"
    assert v["cpu_nodes"] == v["meta_nodes"] == "NllLossBackward0"
    assert int(str(v["cpu_address"]), 16) > 0
    assert v["meta_address"] == "0x0"
    assert v["same_place"] is True
    assert v["other_place"] is False
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) + torch.zeros(2, device="meta")
    assert v["mixing"] == str(caught.value)
    count = len(list(model.parameters()))
    assert v["parameters"] == v["gradients_there"] == v["states_there"] == count
    assert v["terms"] == 10_000
    assert 0 <= v["difference"] < 1e-2  # type: ignore[operator]
    width, layers, vocabulary, positions = 768, 12, 50257, 1024
    block = 12 * width**2 + 13 * width  # matrices, biases and two norms of GPT-2
    gpt2 = (vocabulary + positions) * width + layers * block + 2 * width
    assert v["gpt2_parameters"] == gpt2 == 124_439_808
    assert v["gpt2_megabytes"] == near(497.759232)
    assert v["gpt2_stored"] == 0


@checks("qkv")
def _(v: dict[str, Value]) -> None:
    model = small_gpt(layers=1)
    attention = model.blocks[0].attention
    weights = [getattr(attention, f"W_{part}").weight for part in ("query", "key", "value")]  # type: ignore[union-attr]
    start = [each.detach().double() for each in weights]
    steps = [v[f"step_{number}"] for number in range(3)]
    assert steps == [0, 10, 40]

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = a.detach().double(), b.detach().double()
        return float((a * b).sum() / (a * a).sum().sqrt() / (b * b).sum().sqrt())

    adam = _AdamW(list(model.parameters()))
    for step in range(41):
        gradients = torch.autograd.grad(
            loss_by_hand(model, random_batch()), list(model.parameters())
        )
        if step == 0:
            mine = [
                gradients[[each is w for each in model.parameters()].index(True)] for w in weights
            ]
            for name, w, g in zip("qkv", weights, mine, strict=True):
                assert v[f"norm_{name}"] == near(w.norm().item())
                assert v[f"gradient_{name}"] == near(g.norm().item(), rel=1e-3)
            assert v["gradient_cosine"] == near(cosine(mine[0], mine[1]), abs=1e-3)
        if step in steps:
            n = steps.index(step)
            # forty steps of rounding apart
            assert v[f"qk_{n}"] == near(cosine(weights[0], weights[1]), abs=0.02)
            assert v[f"qv_{n}"] == near(cosine(weights[0], weights[2]), abs=0.02)
            for name, w, w0 in zip("qkv", weights, start, strict=True):
                drift = ((w.detach().double() - w0).norm() / w0.norm()).item()
                assert v[f"drift_{name}_{n}"] == near(drift, rel=0.02)
        adam.step(gradients)
    assert v["copied_cosine"] == near(1)
    assert v["copied_steps"] == 10
    assert v["copied_after"] < 0.999  # type: ignore[operator]


class _AdamW:
    """Loshchilov & Hutter 2019, written out; lr 0.003 and PyTorch's defaults."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.steps = parameters, 0
        self.m = [torch.zeros_like(each) for each in parameters]
        self.v = [torch.zeros_like(each) for each in parameters]

    @torch.no_grad()
    def step(self, gradients: tuple[torch.Tensor, ...]) -> None:
        self.steps += 1
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
            p *= 1 - 0.003 * 0.01
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            hat = (v / (1 - 0.999**self.steps)).sqrt() + 1e-8
            p -= 0.003 * m / (1 - 0.9**self.steps) / hat


@checks("attention-scores")
def _(v: dict[str, Value]) -> None:
    exponentials = [math.exp(score) for score in (1, 0, -1)]
    shares = [each / sum(exponentials) for each in exponentials]
    assert [round(each, 3) for each in shares] == [0.665, 0.245, 0.090]
    for n, (angle, score) in enumerate(((0, 1), (90, 0), (180, -1))):
        assert v[f"angle_{n}"] == near(angle, abs=1e-4)
        assert v[f"score_{n}"] == near(score, abs=1e-9)
        assert v[f"weight_{n}"] == near(shares[n])
    assert v["sum"] == near(1)
    doubled = [math.exp(2 * score) for score in (1, 0, -1)]
    assert v["doubled"] == near([each / sum(doubled) for each in doubled])
    assert (v["dimensions"], v["keys"]) == (64, 16)
    assert v["root"] == math.sqrt(64)
    torch.rand(())  # the angle
    q, k = torch.randn(4000, 64).double(), torch.randn(4000, 16, 64).double()
    scores = torch.matmul(k, q.unsqueeze(-1)).squeeze(-1)
    spread = ((scores - scores.mean()) ** 2).mean().sqrt().item()
    assert v["spread"] == near(spread, rel=1e-3) == near(8, rel=0.05)
    assert v["scaled_spread"] == near(spread / 8, rel=1e-3)
    for name, each in (("largest", scores), ("scaled_largest", scores / 8)):
        e = each.exp()
        assert v[name] == near((e / e.sum(1, keepdim=True)).max(1).values.mean().item(), rel=1e-3)
    assert 0 <= v["difference"] < 1e-5  # type: ignore[operator]


@checks("residual-stream")
def _(v: dict[str, Value]) -> None:
    model = small_gpt()
    adam = _AdamW(list(model.parameters()))
    for _step in range(30):
        adam.step(
            torch.autograd.grad(loss_by_hand(model, random_batch()), list(model.parameters()))
        )
    tokens = random_batch(1)[0]
    caught: dict[str, torch.Tensor] = {}
    block = model.blocks[0]
    block.register_forward_pre_hook(lambda _, inputs: caught.update(stream=inputs[0]))
    block.attention.register_forward_hook(lambda _, i, output: caught.update(added=output))  # type: ignore[union-attr, operator]
    block.attention.W_out.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda _, inputs: caught.update(mixed=inputs[0])
    )
    with torch.no_grad():
        model(tokens)
    stream, added = caught["stream"][0, -1], caught["added"][0, -1]
    matrix, mixed = block.attention.W_out.weight, caught["mixed"][0, -1]  # type: ignore[union-attr]
    heads = [matrix[:, half] @ mixed[half] for half in (slice(0, 16), slice(16, 32))]  # type: ignore[index]
    # thirty steps of rounding apart
    close = {"rel": 0.02, "abs": 1e-4}
    assert v["stream_norm"] == near(stream.norm().item(), **close)
    assert v["head_1_norm"] == near(heads[0].norm().item(), **close)
    assert v["head_2_norm"] == near(heads[1].norm().item(), **close)
    assert v["added_norm"] == near(added.norm().item(), **close)
    assert v["after_norm"] == near((stream + added).norm().item(), **close)
    cosine = (stream @ added / stream.norm() / added.norm()).item()
    assert v["cosine"] == near(cosine, abs=0.02)
    assert 0 <= v["difference"] < 1e-6  # type: ignore[operator]
    assert (v["positions"], v["heads"], v["steps"]) == (16, 2, 30)
    assert v["weights_sum"] == near(1)
    assert v["without_norm"] == 0
    assert v["doubled_ratio"] == near(2)
    assert v["weights_changed"] == 0


@checks("vit-arithmetic")
def _(v: dict[str, Value]) -> None:
    assert v == measured("vit-arithmetic", SEED + 1).values, "no seed changes anything"
    assert (v["image_size"], v["patch_size"], v["other_patch_size"]) == (224, 14, 16)
    assert v["side"] == 224 / 14
    assert v["patches"] == 256
    assert v["numbers"] == 14 * 14 * 3
    assert v["tokens"] == 257
    assert v["pairs"] == 257**2
    assert (v["width"], v["blocks"], v["embedding"]) == (384, 12, 512)
    assert (v["heads"], v["head_width"]) == (6, 384 // 6)
    width, tokens = 384, 257
    block = 4 * (width**2 + width) + (8 * width**2 + 5 * width) + 4 * width
    embedding = 14 * 14 * 3 * width + width + width + tokens * width
    assert v["parameters"] == embedding + 12 * block + 2 * width + width * 512 + 512
    assert (v["images"], v["batch_size"], v["epochs"]) == (494_149, 128, 40)
    assert (v["batches"], v["left_over"]) == divmod(494_149, 128) == (3860, 69)
    assert v["updates"] == 154_400
    assert v["other_patches"] == (224 // 16) ** 2
    assert v["other_pairs"] == 197**2
    small = {"layers": 1, "heads": 1, "width": 8, "channels": 3, "classes": 2}
    model = ViT(image_size=28, patch_size=14, **small)  # type: ignore[arg-type]
    assert model.position_embedding.shape[0] == (28 // 14) ** 2 + 1
