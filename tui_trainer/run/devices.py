"""What a run is made of: versions, and the device that it trains on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tui_trainer.config.machine import usable_cores
from tui_trainer.protocol.schema import DeviceInfo

if TYPE_CHECKING:
    import torch


def with_torch(versions: dict[str, str]) -> dict[str, str]:
    """`versions`, with those of torch and what it was built for. Imports torch."""
    import torch

    versions = {**versions, "torch": str(torch.__version__)}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def device_of(model: torch.nn.Module, threads: int) -> DeviceInfo | None:
    """Where a model's parameters are; None when it has none."""
    import torch

    parameter = next(model.parameters(), None)
    if parameter is None:
        return None
    device = parameter.device
    if device.type != "cuda":
        return DeviceInfo(device.type, _processor(device.type), threads=threads)
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo("cuda", properties.name, properties.total_memory, threads)


def no_core_left(threads: int) -> str:
    """What to say of PyTorch's threads where they take every core; "" where one is left.

    Its own choice is all cores, and whatever else runs, if only the screen, then takes one from a
    thread that all others wait for (docs/performance.md has figures).
    """
    allowed = usable_cores()
    if threads == 1 or threads < allowed:
        return ""
    taken = f"all {allowed} cores" if allowed > 1 else "the one core there is"
    return (
        f"PyTorch's {threads} threads take {taken}: where anything else runs, "
        f"OMP_NUM_THREADS={max(1, allowed - 1)} is often faster"
    )


def _processor(kind: str) -> str:
    import platform

    if kind != "cpu":
        return kind
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
