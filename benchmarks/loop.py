"""The plain training script that the benchmarks run, bare and traced.

    python benchmarks/loop.py --shape gpt --steps 200 [--threads 2]     # by itself
    tui-trainer run benchmarks/loop.py --shape vit --steps 2000

`--turns DIR`: train only on requests over two FIFOs in DIR, and report the times of the steps by
this process's own clock (see `turns.py`). `--rival NAME`: log with another tool (`rivals.py`).

Shapes: `gpt` is nanoGPT's CPU shape, `gpt-gpu` its GPU shape, `gpt2` GPT-2 124M, `vit` the shipped
ViT on scikit-learn's digits, `tiny` one for testing the benchmarks themselves.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tui_trainer.models.gpt import GPT
from tui_trainer.models.vit import ViT

sys.path.insert(0, str(Path(__file__).parent))

from clock import Clock

GPTS: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "heads": 2, "width": 32, "block_size": 32, "batch": 8},
    "gpt": {"layers": 4, "heads": 4, "width": 128, "block_size": 64, "batch": 12},
    "gpt-gpu": {
        "layers": 6, "heads": 6, "width": 384, "block_size": 256, "batch": 64, "dropout": 0.2,
    },
    "gpt2": {
        "layers": 12, "heads": 12, "width": 768, "block_size": 1024, "batch": 8,
        "vocabulary": 50304, "bias": True,
    },
}  # fmt: skip
Batches = Iterator[tuple[Tensor, Tensor]]


def gpt(shape: dict[str, Any], device: torch.device) -> tuple[nn.Module, Batches]:
    """A GPT, and batches (inputs, targets), both (B, T), of random parts of Python's language
    reference."""
    shape = dict(shape)
    batch, block = shape.pop("batch"), shape["block_size"]
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text])
    model = GPT(**{"vocabulary": len(alphabet), **shape}).to(device)

    def batches() -> Batches:
        while True:
            places = torch.randint(len(tokens) - block, (batch,)).tolist()
            inputs = torch.stack([tokens[i : i + block] for i in places])
            targets = torch.stack([tokens[i + 1 : i + 1 + block] for i in places])
            yield moved(inputs, device), moved(targets, device)

    return model, batches()


def vit(device: torch.device) -> tuple[nn.Module, Batches]:
    """The ViT of `tui-trainer vit`, and batches of 64 digits: (B, 1, 8, 8) and (B,)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
    labels = torch.tensor(found.target)
    model = ViT(
        classes=10, image_size=8, patch_size=2, channels=1, layers=4, heads=4, width=64,
        pooling="mean", dropout=0.1,
    ).to(device)  # fmt: skip

    def batches() -> Batches:
        while True:
            for chosen in torch.randperm(len(labels)).split(64):
                yield moved(pixels[chosen], device), moved(labels[chosen], device)

    return model, batches()


def moved(batch: Tensor, device: torch.device) -> Tensor:
    """The batch on the device, copied as in nanoGPT: from pinned memory, without waiting."""
    if device.type != "cuda":
        return batch
    return batch.pin_memory().to(device, non_blocking=True)


def train(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    precision: Any,
    log: Callable[[int, Tensor], None],
    clock: Clock,
) -> None:
    """The textbook loop."""
    for step, (inputs, targets) in enumerate(batches, start=1):
        optimizer.zero_grad(set_to_none=True)
        with precision:
            logits = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        loss.backward()
        log(step, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if clock.over():
            return


def build(options: argparse.Namespace) -> tuple[nn.Module, Callable[[Clock], None]]:
    """The model, and the training loop, which only needs a clock."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.shape == "vit":
        model, batches = vit(device)
    else:
        shape = dict(GPTS[options.shape])
        shape["batch"] = options.batch or shape["batch"]
        model, batches = gpt(shape, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    half = options.dtype == "bf16"
    precision = torch.autocast(device.type, dtype=torch.bfloat16) if half else nullcontext()
    log: Callable[[int, Tensor], None] = lambda step, loss: None  # noqa: E731
    if options.rival:
        import rivals

        log = rivals.start(options.rival, model, options.turns or scratch())
    if options.compile:
        model.compile()
    return model, functools.partial(train, model, batches, optimizer, precision, log)


def scratch() -> Path:
    """A folder that is removed when this process exits."""
    folder = tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return Path(folder.name)


def main() -> None:
    """Build the model and train it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*GPTS, "vit"], default="gpt")
    parser.add_argument("--batch", type=int, help="examples per step, in place of the shape's own")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rival", default="")
    parser.add_argument("--turns", type=Path)
    options = parser.parse_args()
    torch.manual_seed(1337)
    _, loop = build(options)
    clock = Clock(options.turns, options.steps, torch.device(options.device))
    began = time.perf_counter()
    loop(clock)
    if options.turns is None:
        seconds = time.perf_counter() - began
        print(f"{options.steps} steps, {1e3 * seconds / options.steps:.2f} ms each")


if __name__ == "__main__":
    main()
