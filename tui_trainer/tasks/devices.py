"""Which device trains, in which precision, with how many threads."""

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

from tui_trainer.config.errors import ConfigurationError, near_miss
from tui_trainer.config.machine import usable_cores
from tui_trainer.config.training import TrainingConfig

# type: ignore[import-untyped, unused-ignore]


_PREFERRED = ("cuda", "mps", "xpu", "cpu")
_SMALL_WORK = 5e8
"""Parameters × items per step below which more than four threads only wait for each other."""


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto`: CUDA, then MPS, XPU, CPU. Raises ConfigurationError."""
    there = {kind: _count(kind) for kind in _PREFERRED}
    if name == "auto":
        return torch.device(next(kind for kind in _PREFERRED if there[kind]))
    kind, _, index = name.partition(":")
    if kind not in there or (index and not index.isdigit()):
        raise ConfigurationError(
            f"there is no kind of device {name!r}", near_miss(kind, ("auto", *_PREFERRED))
        )
    found = [f"{kind}:{number}" for kind in there for number in range(there[kind])]
    listing = ", ".join("cpu" if device == "cpu:0" else device for device in found)
    if not there[kind] or int(index or 0) >= there[kind]:
        hint = f"there is {listing}; --device auto takes the best"
        raise ConfigurationError(f"there is no device {name} here", hint)
    return torch.device(name)


def _count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    return int(torch.backends.mps.is_available()) if kind == "mps" else 1


def choose_threads(requested: int, work: float = 0.0) -> int:
    """Threads for PyTorch: as requested, or (0) all cores but one, which the screen and the rest
    of the machine need; with all of them taken, OpenMP's barriers wait for whoever else runs.

    `work` is parameters × items per step: small work gets four at most.
    """
    if requested:
        return requested
    allowed = usable_cores()
    free = max(1, min(allowed, psutil.cpu_count(logical=False) or allowed) - 1)
    return min(free, 4) if work < _SMALL_WORK else free


def prepare(config: TrainingConfig) -> torch.device:
    """Choose the device and seed everything random. Raises ConfigurationError."""
    device = choose_device(config.device)
    if config.compile and device.type == "cpu":
        _check_compiler()
    if config.deterministic:
        if device.type == "cuda":
            # what cuBLAS asks for; it must be there before the first CUDA call
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # filling fresh memory is for finding bugs in kernels, and dear
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(config.seed)
    np.random.seed(config.seed % 2**32)
    random.seed(config.seed)
    return device


def _check_compiler() -> None:
    """torch.compile makes C++ of a model for the CPU. Raises ConfigurationError."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # not public: then the first forward pass will say it
        return
    try:
        get_cpp_compiler()
    except Exception:
        raise ConfigurationError(
            "--compile needs a C++ compiler, and none is found here",
            "install one, such as g++ (or name it in $CXX), or give --no-compile",
        ) from None


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to the configured precision; nothing for float32. May be entered again and again."""
    if config.dtype == "float32":
        return nullcontext()
    precision = torch.bfloat16 if config.dtype == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=precision)


class GradScaler(torch.amp.GradScaler):
    """PyTorch's, whose state may be taken between its `step` and its `update` as well.

    A checkpoint is taken when the optimizer has stepped, which is inside `step`; a run that goes on
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


def make_scaler(config: TrainingConfig, device: torch.device) -> GradScaler:
    """Loss scaling, which fp16 needs and which does nothing for the others."""
    return GradScaler(device.type, enabled=config.dtype == "fp16")


# ---- evaluating
# What evaluations share.


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; the model's mode and PyTorch's generators are left as found."""
    was_training = model.training
    state = torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        torch.set_rng_state(state)
