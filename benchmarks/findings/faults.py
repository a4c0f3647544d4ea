"""Three small training programs with the faults of TheDeepChecker's catalogue.

    python benchmarks/findings/faults.py mlp|cnn|gpt FAULT [--clean] [STEPS]

The kinds are those of Braiek and Khomh, "Testing Feedforward Neural Networks Training Programs"
(2022), whose programs are written with TensorFlow. All data are synthetic. With `--clean` the
fault is left out, and all that it requires (a validation set, another optimizer) stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

Batch = tuple[torch.Tensor, torch.Tensor]

CLASSES = 10


class MLP(nn.Module):
    def __init__(self, activation: Callable[[], nn.Module], outputs: int) -> None:
        super().__init__()
        self.hidden_1 = nn.Linear(16, 64)
        self.act_1 = activation()
        self.hidden_2 = nn.Linear(64, 64)
        self.act_2 = activation()
        self.out = nn.Linear(64, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act_1(self.hidden_1(x))
        return self.out(self.act_2(self.hidden_2(x)))


class CNN(nn.Module):
    """Ten convolutions with batch normalization; the third and the sixth halve the image."""

    def __init__(self, activation: Callable[[], nn.Module], normalized: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for number in range(1, 11):
            width = 12 if number <= 5 else 24
            stride = 2 if number in (3, 6) else 1
            layers.append(nn.Conv2d(channels, width, 3, stride, padding=1))
            if normalized:
                layers.append(nn.BatchNorm2d(width))
            layers.append(activation())
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc = nn.Linear(width, 4 * width)
        self.act = activation()
        self.fc_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            each.view(batch, length, 4, -1).transpose(1, 2)
            for each in self.qkv(self.ln_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.fc_proj(self.act(self.fc(self.ln_2(x))))


class GPT(nn.Module):
    SYMBOLS, CONTEXT, WIDTH = 32, 24, 48

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.wte = nn.Embedding(self.SYMBOLS, self.WIDTH)
        self.wpe = nn.Embedding(self.CONTEXT, self.WIDTH)
        self.blocks = nn.Sequential(*(Block(self.WIDTH, activation) for _ in range(2)))
        self.ln_f = nn.LayerNorm(self.WIDTH)
        self.lm_head = nn.Linear(self.WIDTH, self.SYMBOLS, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.ln_f(self.blocks(self.wte(text) + self.wpe.weight)))


def rows(fault: str, number: int, validating: bool) -> Batch:
    """Columns of very different units; the class is that of a random network's largest output."""
    random = torch.Generator().manual_seed(21)
    teacher = [torch.randn(16, 32, generator=random), torch.randn(32, CLASSES, generator=random)]
    units = 10 ** (4 * torch.rand(16, generator=random) - 1)
    means = units * torch.randn(16, generator=random)
    random.manual_seed(22 if validating else 23)
    plain = torch.randn(number, 16, generator=random)
    outputs = torch.tanh(plain @ teacher[0] / 4) @ teacher[1]
    measured = plain * units + means
    inputs = measured if fault == "missing_normalization" else (measured - means) / units
    if fault == "double_normalization":
        low, high = measured.amin(0), measured.amax(0)
        once = (measured - low) / (high - low)
        inputs = once / (255 * 255)
    if fault in ("over_scaled_outputs", "scaled_outputs"):
        values = outputs[:, 0] / outputs[:, 0].std()
        return inputs, values * (25_000 if fault == "over_scaled_outputs" else 1)
    return inputs, outputs.argmax(1)


def pictures(fault: str, number: int, validating: bool) -> Batch:
    """Grey images of 16 x 16 with values of 0 to 255: a smooth pattern per class, moved, noisy."""
    random = torch.Generator().manual_seed(31)
    coarse = torch.randn(CLASSES, 1, 4, 4, generator=random)
    patterns = F.interpolate(coarse, size=16, mode="bicubic")[:, 0]
    random.manual_seed(32 if validating else 33)
    labels = torch.randint(CLASSES, (number,), generator=random)
    moved = torch.randint(-2, 3, (number, 2), generator=random).tolist()
    images = torch.stack(
        [patterns[label].roll(move, (0, 1)) for label, move in zip(labels, moved, strict=True)]
    )
    images = images + 0.5 * torch.randn(images.shape, generator=random)
    grey = (images * 45 + 127).clamp(0, 255).round().unsqueeze(1)
    if fault == "missing_normalization":
        return grey, labels
    if fault == "double_normalization":
        return grey / 255 / 255, labels
    return (grey / 255 - 0.5) / 0.25, labels


def texts(fault: str, number: int, validating: bool) -> Batch:
    """Sentences of a Markov chain over 32 symbols, in which few may follow each."""
    random = torch.Generator().manual_seed(41)
    chain = torch.softmax(4 * torch.randn(GPT.SYMBOLS, GPT.SYMBOLS, generator=random), 1)
    random.manual_seed(42 if validating else 43)
    text = torch.randint(GPT.SYMBOLS, (number, GPT.CONTEXT + 1), generator=random)
    for position in range(GPT.CONTEXT):
        text[:, position + 1] = torch.multinomial(chain[text[:, position]], 1, generator=random)[
            :, 0
        ]
    return text[:, :-1], text[:, 1:]


def batches(data: Batch, kind: str, fault: str, size: int) -> Iterator[Batch]:
    inputs, targets = data
    if fault == "wrong_labels":
        inputs = inputs[torch.randperm(len(inputs))]
    if fault == "unbalanced_data":
        kept = torch.rand(len(targets)) < 0.25**targets
        inputs, targets = inputs[kept], targets[kept]
    while True:
        for chosen in torch.randperm(len(inputs)).split(size):
            x = inputs[chosen]
            if fault == "wrong_augmentation":
                x = x + 4 * torch.randn_like(x) + 3
                if kind == "cnn":
                    x[:, :, 4:] = 0
            yield x, targets[chosen]


def loss_of(fault: str, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, or what the fault makes of it; `logits` are (rows, classes)."""
    if fault in ("over_scaled_outputs", "scaled_outputs"):
        return F.mse_loss(logits[:, 0], targets)
    hot = F.one_hot(targets, logits.shape[1]).float()
    match fault:
        case "missing_softmax":
            return -(hot * logits.clamp(1e-7, 1).log()).sum(1).mean()
        case "redundant_softmax":
            return F.cross_entropy(logits.softmax(1), targets)
        case "wrong_softmax_implementation":
            return F.nll_loss(logits.log_softmax(0), targets)
        case "wrong_loss_reduction":
            return -(hot * logits.log_softmax(1)).mean(1).sum()
        case "wrong_loss_axis":
            return -(hot * logits.log_softmax(1)).sum(0).mean()
        case "wrong_loss_selection":
            return F.mse_loss(logits.softmax(1), hot)
        case _:
            return F.cross_entropy(logits, targets)


def initialise(model: nn.Module, fault: str) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            if fault == "constant_initialisation":
                nn.init.constant_(module.weight, 0.05)
            elif fault == "large_initialisation":
                nn.init.normal_(module.weight, std=1.0)


def optimizer_of(kind: str, fault: str, clean: bool, model: nn.Module) -> torch.optim.Optimizer:
    rate = {"mlp": 0.1, "cnn": 0.05, "gpt": 3e-3}[kind]
    if fault == "low_adam_epsilon":
        if clean:
            return torch.optim.Adam(model.parameters(), lr=1e-3)
        return torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-16)
    if not clean and fault == "high_rate":
        rate *= 100 if kind == "gpt" else 40
    if not clean and fault == "low_rate":
        rate /= 1000
    if fault in ("over_scaled_outputs", "scaled_outputs"):
        rate = 0.01
    if kind == "gpt":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


def main(kind: str, fault: str, clean: bool, steps: int) -> None:
    torch.manual_seed(20)
    active = "" if clean else fault
    if clean and fault == "over_scaled_outputs":
        active = "scaled_outputs"
    overfitting = fault == "missing_regularization"
    source = {"mlp": rows, "cnn": pictures, "gpt": texts}[kind]
    data = source(active, 48 if overfitting and not clean else 4096, validating=False)
    held_out = source(active, 256, validating=True)

    activation: Callable[[], nn.Module] = nn.GELU if kind == "gpt" else nn.ReLU
    if active == "wrong_activation":
        activation = partial(nn.Softmax, dim=1 if kind == "cnn" else -1)
    model: nn.Module
    if kind == "mlp":
        model = MLP(activation, 1 if "scaled_outputs" in active else CLASSES)
    elif kind == "cnn":
        model = CNN(activation, normalized=active != "missing_batchnorm")
    else:
        model = GPT(activation)
    initialise(model, active)
    optimizer = optimizer_of(kind, fault, clean, model)
    warmup = 10 if kind == "gpt" or fault == "low_adam_epsilon" else 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup)
    )
    size = 16 if kind == "gpt" or overfitting else 64
    feed = batches(data, kind, active, size)
    for step in range(1, steps + 1):
        inputs, targets = next(feed)
        if active == "wrong_labels" and kind == "gpt":
            targets = targets[torch.randperm(len(targets))]
        optimizer.zero_grad()
        loss = loss_of(active, model(inputs).flatten(0, -2), targets.flatten())
        if active == "over_regularization":
            loss = loss + 0.1 * sum(each.square().sum() for each in model.parameters())
        loss.backward()
        if active == "flipped_sign":
            for parameter in model.parameters():
                parameter.grad.neg_()
        optimizer.step()
        schedule.step()
        if overfitting and step % 10 == 0:
            model.eval()
            with torch.no_grad():
                outputs = model(held_out[0]).flatten(0, -2)
                print("validation loss", F.cross_entropy(outputs, held_out[1].flatten()).item())
            model.train()
        if step in (1, steps) or step % 25 == 0:
            print("step", step, "loss", loss.item())


if __name__ == "__main__":
    arguments = [each for each in sys.argv[1:] if each != "--clean"]
    main(
        arguments[0],
        arguments[1],
        "--clean" in sys.argv,
        int(arguments[2]) if len(arguments) > 2 else 200,
    )
