"""Singular values of Wq, Wk and Wv: largest one, stable rank, effective rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from tui_trainer.history.records import Floats
from tui_trainer.probes.attention_layers import find_layers
from tui_trainer.probes.decomposing import LARGEST_SIDE, Decomposer, Values, singular_values
from tui_trainer.protocol import tables
from tui_trainer.protocol.tables import SPECTRUM_STATISTICS, attention_columns
from tui_trainer.tracing.probe import Facts, Options, Probe, Readings, TableSpec
from tui_trainer.tracing.subject import Subject


class AttentionSpectrum(Probe):
    """Table `attention_spectrum`: a row when every layer has had its turn.

    One matrix is decomposed at a time, so that no single step pays for all: with L layers a row
    comes after 3·L measurements, and its values are up to so many measurements old. Spectra move
    slowly. From an accelerator the matrix itself is copied like any other reading, without waiting,
    and decomposed beside the training; a turn comes once the one before it is done.
    """

    name = tables.ATTENTION_SPECTRUM
    every = 8
    topic = tables.ATTENTION_SPECTRUM
    watched_every = 2
    importance = 10
    furthest = 64
    lasting = True

    def __init__(self, subject: Subject, options: Options) -> None:
        super().__init__(subject, options)
        found = find_layers(subject, options.attention_pattern)
        self._layers, self.unseen = found.layers, found.nothing
        if self.unseen:
            return
        paths = tuple(layer.path for layer in self._layers)
        columns = attention_columns(paths, SPECTRUM_STATISTICS)
        self.tables = (TableSpec(self.name, columns),)
        self._turns = 3 * len(self._layers)
        self._turn = 0
        self._sent: deque[tuple[int, tuple[int, int]]] = deque()
        """Turn and shape of the matrices on their way to the host."""
        self._decomposer = None if subject.device.type == "cpu" else Decomposer()
        self._values = np.full((len(self._layers), 3, 3), np.nan)
        """(layer, statistic, q|k|v)."""
        self._complete = False

    def after_update(self) -> Readings:
        """The singular values of one matrix; on an accelerator the matrix."""
        if self._decomposer is not None and (self._sent or self._decomposer.under_way):
            return ()
        turn = self._turn
        self._turn = (turn + 1) % self._turns
        part = self._layers[turn // 3].parts[turn % 3]
        matrix = part.view(self.subject.parameters[part.parameter].detach())
        self._sent.append((turn, (matrix.shape[0], matrix.shape[1])))
        if self._decomposer is None:
            return [singular_values(matrix)]
        if min(matrix.shape) > LARGEST_SIDE:
            return [matrix.new_full((1,), torch.nan)]
        return [matrix.reshape(-1).clone()]  # the weights move on before it is fetched

    def rows(self, values: Floats, facts: Facts) -> Sequence[Floats | None]:
        """A row after the last matrix."""
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
    sigma = values
    largest = float(sigma.max())
    if not largest > 0:
        return largest, float("nan"), float("nan")
    share = sigma / sigma.sum()
    share = share[share > 0]
    return (
        largest,
        float(np.sum(sigma**2) / largest**2),
        float(np.exp(-np.sum(share * np.log(share)))),
    )
