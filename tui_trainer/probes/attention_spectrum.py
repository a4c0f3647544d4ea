"""Singular values of Wq, Wk and Wv: largest one, stable rank, effective rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from tui_trainer.history.records import Floats
from tui_trainer.probes.attention import NO_LAYERS
from tui_trainer.probes.attention_layers import Layer, find_layers
from tui_trainer.protocol import tables
from tui_trainer.protocol.tables import SPECTRUM_STATISTICS, attention_columns
from tui_trainer.tracing.probe import Facts, Options, Probe, Readings, TableSpec
from tui_trainer.tracing.subject import Subject

LARGEST_SIDE = 4096
"""Matrices with a smaller side beyond this are left out (NaN): their spectrum takes seconds."""


class AttentionSpectrum(Probe):
    """Table `attention_spectrum`: a row when every layer has had its turn.

    One matrix is decomposed at a time, so that no single step pays for all: with L layers a row
    comes after 3·L measurements, and its values are up to so many measurements old. Spectra move
    slowly. Singular values are the square roots of the eigenvalues of the smaller of WWᵀ and WᵀW,
    in float64. On an accelerator the decomposition makes the host wait once.
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
        self._layers = find_layers(subject, options.attention_pattern)
        if not self._layers:
            self.unseen = NO_LAYERS
            return
        paths = tuple(layer.path for layer in self._layers)
        columns = attention_columns(paths, SPECTRUM_STATISTICS)
        self.tables = (TableSpec(self.name, columns),)
        self._turn = 0
        self._under_way: deque[int] = deque()
        self._values = np.full((len(self._layers), 3, 3), np.nan)
        """(layer, statistic, q|k|v)."""

    def after_update(self) -> Readings:
        """The singular values of one matrix."""
        turn = self._turn
        self._turn = (turn + 1) % (3 * len(self._layers))
        self._under_way.append(turn)
        return [singular_values(self.subject.parameters, self._layers[turn // 3], turn % 3)]

    def rows(self, values: Floats, facts: Facts) -> Sequence[Floats | None]:
        """A row after the last matrix."""
        turn = self._under_way.popleft()
        self._values[turn // 3, :, turn % 3] = ranks(values)
        if turn != 3 * len(self._layers) - 1:
            return (None,)
        return (self._values.astype(np.float32).reshape(-1),)


def singular_values(parameters: Sequence[torch.Tensor], layer: Layer, which: int) -> torch.Tensor:
    """Of Wq, Wk or Wv (`which` 0 to 2), in ascending order; NaN for one that is too large."""
    part = layer.parts[which]
    matrix = part.view(parameters[part.parameter].detach())
    if matrix.device.type == "mps":  # has no float64
        matrix = matrix.cpu()
    matrix = matrix.to(torch.float64)
    if min(matrix.shape) > LARGEST_SIDE:
        return matrix.new_full((1,), torch.nan)
    gram = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
    if not bool(torch.isfinite(gram).all()):
        return matrix.new_full((1,), torch.nan)
    found: torch.Tensor = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return found


def ranks(values: Floats) -> tuple[float, float, float]:
    """σ_max, stable rank ‖W‖²/σ_max², and effective rank exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ
    (Roy & Vetterli 2007)."""
    sigma = values.astype(np.float64)
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
