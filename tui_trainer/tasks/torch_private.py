"""Everything in the example tasks that relies on PyTorch's private names.

Seen in PyTorch 2.6 to 2.13. `tests/tasks/test_tasks_torch_private.py` fails for each entry that a
new version breaks.
"""

from __future__ import annotations

from typing import Any

import torch


def cpp_compiler_found() -> bool:
    """Whether torch.compile finds a C++ compiler for the CPU; True where that is unknown."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # the first forward pass reports a missing compiler instead
        return True
    try:
        get_cpp_compiler()
    except Exception:
        return False
    return True


class GradScaler(torch.amp.GradScaler):
    """PyTorch's GradScaler, whose state may also be saved between its `step` and its `update`.

    A checkpoint is taken within `step`, when the optimizer has stepped. A run that continues from
    it does not call the `update` of that step again, so the saved state includes that update. The
    step may be one with infinite gradients, for which a fused optimizer is called, and which it
    skips by itself.
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's; also discards a step in progress."""
        super().load_state_dict(state_dict)
        self._stepping = False
        if self.is_enabled():
            self._per_optimizer_states.clear()

    def state_dict(self) -> dict[str, Any]:
        """The state after the `update` that follows the step in progress."""
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
        """`found_inf` of this step for each optimizer and device (0-d, above 0 if gradients are not
        finite): the input of PyTorch's `update`."""
        states = self._per_optimizer_states.values()
        device = self._scale.device if self._scale is not None else None
        return [f.to(device) for state in states for f in state["found_inf_per_device"].values()]
