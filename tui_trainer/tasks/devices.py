"""Sets up the device, its precision, the threads and the seeds of a training."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import psutil
import torch
from torch import nn

from tui_trainer.config.errors import ConfigurationError, did_you_mean
from tui_trainer.config.machine import usable_cores
from tui_trainer.config.training import TrainingConfig
from tui_trainer.tasks.torch_private import GradScaler, cpp_compiler_found

DEVICE_KINDS = ("cuda", "mps", "xpu", "cpu")
"""Kinds in the order in which `auto` prefers them."""
SMALL_WORK = 5e8
"""Parameters × items per step below which more than four threads do not make a step faster."""
MAX_THREADS_FOR_SMALL_WORK = 4


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first of DEVICE_KINDS that exists.

    Raises ConfigurationError.
    """
    counts = {kind: _device_count(kind) for kind in DEVICE_KINDS}
    if name == "auto":
        return torch.device(next(kind for kind in DEVICE_KINDS if counts[kind]))
    kind, _, index = name.partition(":")
    if kind not in counts or (index and not index.isdigit()):
        raise ConfigurationError(
            f"there is no kind of device {name!r}", did_you_mean(kind, ("auto", *DEVICE_KINDS))
        )
    if not counts[kind] or int(index or 0) >= counts[kind]:
        devices = [f"{kind}:{number}" for kind in counts for number in range(counts[kind])]
        listing = ", ".join("cpu" if device == "cpu:0" else device for device in devices)
        hint = f"available: {listing}; --device auto chooses the best"
        raise ConfigurationError(f"there is no device {name} here", hint)
    return torch.device(name)


def _device_count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    return int(torch.backends.mps.is_available()) if kind == "mps" else 1


def choose_threads(requested: int, work: float = 0.0) -> int:
    """The number of PyTorch's threads: `requested`, or if that is 0, all cores but one.

    The free core is for the screen and other programs: with all cores taken, every OpenMP barrier
    waits for the thread that shares its core. `work` is parameters × items per step.
    """
    if requested:
        return requested
    cores = usable_cores()
    threads = max(1, min(cores, psutil.cpu_count(logical=False) or cores) - 1)
    return min(threads, MAX_THREADS_FOR_SMALL_WORK) if work < SMALL_WORK else threads


def set_up(config: TrainingConfig) -> torch.device:
    """Choose the device, configure determinism and seed all generators; returns the device.

    Raises ConfigurationError.
    """
    device = choose_device(config.device)
    if config.compile and device.type == "cpu":
        _require_compiler()
    if config.deterministic:
        if device.type == "cuda":
            # Required by cuBLAS, and read at the first CUDA call.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling uninitialised memory only serves to find bugs in kernels, and is slow.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(config.seed)
    np.random.seed(config.seed % 2**32)
    random.seed(config.seed)
    return device


def _require_compiler() -> None:
    """Raises ConfigurationError without a C++ compiler, which torch.compile needs for the CPU."""
    if not cpp_compiler_found():
        raise ConfigurationError(
            "--compile needs a C++ compiler, and none was found",
            "install one, such as g++ (or name it in $CXX), or give --no-compile",
        )


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to the configured precision; reusable, and a no-op for float32."""
    if config.dtype == "float32":
        return nullcontext()
    precision = torch.bfloat16 if config.dtype == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=precision)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients and dropout; restores the model's mode and PyTorch's CPU
    generator."""
    was_training = model.training
    state = torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        torch.set_rng_state(state)


def create_scaler(config: TrainingConfig, device: torch.device) -> GradScaler:
    """Loss scaling for fp16; disabled for other precisions."""
    return GradScaler(device.type, enabled=config.dtype == "fp16")
