"""Measures the singular values of Wq, Wk and Wv: largest one, stable rank, effective rank."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tui_trainer.history.records import Floats
from tui_trainer.probes.attention.layers import find_layers
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import SPECTRUM_STATISTICS, attention_columns
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, TableSpec

LARGEST_SIDE = 4096
"""Matrices whose smaller side exceeds this are not decomposed (nan): it takes seconds."""

Values = NDArray[np.float64]


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Singular values of a matrix on the CPU, ascending, float64; a single nan if the matrix is too
    large or not finite. They are square roots of the eigenvalues of the smaller of WWᵀ and WᵀW."""
    if min(matrix.shape) > LARGEST_SIDE:
        return torch.full((1,), torch.nan, dtype=torch.float64)
    matrix = matrix.to(torch.float64)
    gram = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
    if not bool(torch.isfinite(gram).all()):
        return matrix.new_full((1,), torch.nan)
    found: torch.Tensor = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return found


class Decomposer:
    """Decomposes matrices on a thread of its own, one at a time.

    numpy releases the GIL meanwhile, so that the training thread is hardly delayed in launching
    work on an accelerator.
    """

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[int, Values]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, Values]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.under_way = 0
        """Number of matrices that were put and whose values were not taken yet."""

    def put(self, key: int, matrix: Values) -> None:
        """Queue a matrix."""
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
        """Pass the results since the last call to `found(key, ascending singular values)`."""
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
    except np.linalg.LinAlgError:  # nan or infinities
        return np.full(1, np.nan)
    return np.sqrt(np.maximum(squares, 0.0))


class AttentionSpectrum(Probe):
    """Table `attention_spectrum`: a row once every layer has been decomposed.

    One matrix is decomposed at a time, so that no single step takes long: with L layers there is a
    row every 3·L measurements, whose values are up to that many measurements old. Spectra change
    slowly. On an accelerator the matrix is copied to the host like any other reading and decomposed
    on a thread; the next matrix follows once the last one is done.
    """

    name = schema.ATTENTION_SPECTRUM
    every = 8
    topic = schema.ATTENTION_SPECTRUM
    watched_every = 2
    importance = 10
    max_stretch = 64
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        found = find_layers(tracked, options.attention_pattern)
        self._layers, self.unseen = found.layers, found.nothing
        if self.unseen:
            return
        paths = tuple(layer.path for layer in self._layers)
        columns = attention_columns(paths, SPECTRUM_STATISTICS)
        self.tables = (TableSpec(self.name, columns),)
        self._turns = 3 * len(self._layers)
        self._turn = 0
        self._sent: deque[tuple[int, tuple[int, int]]] = deque()
        """(turn, shape) of the matrices that are being copied to the host."""
        self._decomposer = None if tracked.device.type == "cpu" else Decomposer()
        self._values = np.full((len(self._layers), 3, 3), np.nan)
        """(layer, statistic, q|k|v)."""
        self._complete = False

    def after_update(self) -> Readings:
        """Singular values of one matrix; on an accelerator, the matrix."""
        if self._decomposer is not None and (self._sent or self._decomposer.under_way):
            return ()
        turn = self._turn
        self._turn = (turn + 1) % self._turns
        part = self._layers[turn // 3].parts[turn % 3]
        matrix = part.view(self.tracked.weight(part.parameter))
        self._sent.append((turn, (matrix.shape[0], matrix.shape[1])))
        if self._decomposer is None:
            return [singular_values(matrix)]
        if min(matrix.shape) > LARGEST_SIDE:
            return [matrix.new_full((1,), torch.nan)]
        return [matrix.reshape(-1).clone()]  # the weights change before it is fetched

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Make a row after the last matrix of the last layer."""
        self._complete = False
        if self._decomposer is not None:
            self._decomposer.take(self._found)
        if values.size:
            turn, shape = self._sent.popleft()
            if self._decomposer is None or values.size == 1 < shape[0] * shape[1]:
                self._found(turn, values.astype(np.float64))
            else:
                self._decomposer.put(turn, values.astype(np.float64).reshape(shape))
        return (self._values.astype(np.float32).reshape(-1) if self._complete else None,)

    def _found(self, turn: int, values: Values) -> None:
        self._values[turn // 3, :, turn % 3] = ranks(values)
        self._complete = turn == self._turns - 1


def ranks(values: Values) -> tuple[float, float, float]:
    """σ_max, stable rank ‖W‖²/σ_max², and effective rank exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ
    (Roy & Vetterli 2007)."""
    largest = float(values.max())
    if not largest > 0:
        return largest, float("nan"), float("nan")
    share = values / values.sum()
    share = share[share > 0]
    return (
        largest,
        float(np.sum(values**2) / largest**2),
        float(np.exp(-np.sum(share * np.log(share)))),
    )
