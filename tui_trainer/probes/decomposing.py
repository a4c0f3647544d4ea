"""Singular values: at once on a CPU, on a thread of our own for weights of an accelerator."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

LARGEST_SIDE = 4096
"""Matrices with a smaller side beyond this are left out (NaN): their spectrum takes seconds."""

Values = NDArray[np.float64]


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Of a matrix on the CPU, in ascending order and float64; NaN for one that is too large or not
    finite. The square roots of the eigenvalues of the smaller of WWᵀ and WᵀW."""
    if min(matrix.shape) > LARGEST_SIDE:
        return torch.full((1,), torch.nan, dtype=torch.float64)
    matrix = matrix.to(torch.float64)
    gram = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
    if not bool(torch.isfinite(gram).all()):
        return matrix.new_full((1,), torch.nan)
    found: torch.Tensor = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return found


class Decomposer:
    """Decomposes matrices on a thread of its own, one at a time: numpy lets go of Python's lock for
    it, so that the training thread, busy with launching work on an accelerator, hardly notices."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[int, Values]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, Values]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.under_way = 0
        """Matrices that were put in and whose values were not taken out yet."""

    def put(self, key: int, matrix: Values) -> None:
        """Decompose this matrix."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work,
                args=(self._waiting, self._done),
                name="tui-trainer spectra",
                daemon=True,
            )
            self._thread.start()
        self.under_way += 1
        self._waiting.put((key, matrix))

    def take(self, found: Callable[[int, Values], None]) -> None:
        """Tell what has been found since the last call: (key, singular values, ascending)."""
        while not self._done.empty():
            self.under_way -= 1
            found(*self._done.get())


def _work(
    waiting: queue.SimpleQueue[tuple[int, Values]], done: queue.SimpleQueue[tuple[int, Values]]
) -> None:
    while True:
        key, matrix = waiting.get()
        done.put((key, _decompose(matrix)))


def _decompose(matrix: Values) -> Values:
    try:
        wide = matrix.shape[0] <= matrix.shape[1]
        gram = matrix @ matrix.T if wide else matrix.T @ matrix
        squares = np.asarray(np.linalg.eigvalsh(gram), dtype=np.float64)
    except np.linalg.LinAlgError:  # NaN or infinities
        return np.full(1, np.nan)
    return np.sqrt(np.maximum(squares, 0.0))
