"""The time to open a tensor in the inspector, on the training thread, compared with `tensor.sum()`.

.venv/bin/python benchmarks/inspect_tensor.py [THREADS]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from tui_trainer.inspector.heat_map import heat_map
from tui_trainer.inspector.tensor_statistics import statistics_of
from tui_trainer.protocol.heat_map import HeatMapWindow

SHAPES = ((1000, 1000), (1_000_000,), (4096, 4096), (10_000, 10_000))


def best_ms(work: Callable[[], object], times: int) -> float:
    """The fastest of several calls, in milliseconds, after one that does not count."""
    work()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found) * 1e3


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(1)
    print(f"{device}, {torch.get_num_threads()} threads")
    print(f"{'shape':>16} {'sum ms':>9} {'summary ms':>11} {'ratio':>8} {'zoom ms':>8}")
    for shape in SHAPES:
        tensor = torch.randn(shape, generator=generator, device=device)
        times = 10 if tensor.numel() < 1e7 else 3

        def total(tensor: torch.Tensor = tensor) -> float:
            return float(tensor.sum())

        def summary(tensor: torch.Tensor = tensor) -> None:
            statistics_of(tensor, 8)
            heat_map(tensor, HeatMapWindow(64, 64))

        def zoom(tensor: torch.Tensor = tensor) -> None:
            half = HeatMapWindow(64, 64, column_to=tensor.shape[-1] // 2)
            heat_map(tensor, half)

        plain, opened = best_ms(total, times), best_ms(summary, times)
        near = best_ms(zoom, times)
        name = "×".join(f"{size:,}" for size in shape)
        print(f"{name:>16} {plain:9.3f} {opened:11.2f} {opened / plain:8.1f} {near:8.2f}")


if __name__ == "__main__":
    main()
