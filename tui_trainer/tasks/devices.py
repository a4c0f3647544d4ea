"""The device that trains, its precision and threads, and the seeds."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from tui_trainer.config.errors import ConfigurationError, did_you_mean
from tui_trainer.config.machine import usable_cores
from tui_trainer.config.training import TrainingConfig

DEVICE_KINDS = ("cuda", "mps", "xpu", "cpu")
"""In the order in which `auto` prefers them."""
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
    """The number of PyTorch's threads: `requested`, or if that is 0 all cores but one.

    The free core is for the screen and other programs: with all cores taken, every barrier of
    OpenMP waits for the thread that shares its core. `work` is parameters × items per step.
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
    """torch.compile generates C++ for the CPU. Raises ConfigurationError."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # a private name: the first forward pass reports it instead
        return
    try:
        get_cpp_compiler()
    except Exception:
        raise ConfigurationError(
            "--compile needs a C++ compiler, and none was found",
            "install one, such as g++ (or name it in $CXX), or give --no-compile",
        ) from None


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to the configured precision; reusable, and no-op for float32."""
    if config.dtype == "float32":
        return nullcontext()
    precision = torch.bfloat16 if config.dtype == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=precision)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout; restores the model's mode and PyTorch's CPU generator."""
    was_training = model.training
    state = torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        torch.set_rng_state(state)


class GradScaler(torch.amp.GradScaler):
    """PyTorch's, whose state may be taken between its `step` and its `update` as well.

    A checkpoint is taken when the optimizer has stepped, within `step`; a run that continues
    from it has not to make that step's `update` any more. It may be the update of a step that was
    skipped for infinite gradients: a fused optimizer is called for it too, and skips by itself.
    """

    _stepping = False

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As PyTorch's."""
        self._stepping = self.is_enabled()
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """As PyTorch's."""
        super().update(new_scale)
        self._stepping = False

    def state_dict(self) -> dict[str, Any]:
        """The state as it is after the update of the step that is being made."""
        found = self._found_infinite() if self._stepping else []
        if not found or self._scale is None or self._growth_tracker is None:
            return super().state_dict()
        held = self._scale, self._growth_tracker
        self._scale, self._growth_tracker = held[0].clone(), held[1].clone()
        try:
            torch._amp_update_scale_(
                self._scale,
                self._growth_tracker,
                torch.stack(found).sum(),
                self._growth_factor,
                self._backoff_factor,
                self._growth_interval,
            )
            return super().state_dict()
        finally:
            self._scale, self._growth_tracker = held

    def _found_infinite(self) -> list[torch.Tensor]:
        """Of each optimizer and device, whether gradients of this step are not finite (0-d, above 0
        where so): what PyTorch's `update` goes by."""
        states = self._per_optimizer_states.values()
        device = self._scale.device if self._scale is not None else None
        return [f.to(device) for state in states for f in state["found_inf_per_device"].values()]


def create_scaler(config: TrainingConfig, device: torch.device) -> GradScaler:
    """Loss scaling for fp16; disabled for other precisions."""
    return GradScaler(device.type, enabled=config.dtype == "fp16")
