"""Statistics of a tensor, computed on its device in parts of bounded size.

Extremes, moments and counts are exact. Quantiles and histograms of a tensor of more than `SAMPLED`
elements are those of evenly spaced elements. Nothing is random, and no tensor is written.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tui_trainer.inspector.tensor_catalog import evenly_spaced, flat_values, parts_of
from tui_trainer.protocol.inspection import (
    Histogram,
    TensorEntry,
    TensorMoments,
    TensorStatistics,
)

SAMPLED = 1 << 16
"""Maximum number of elements that are sorted, which takes 2 ms. The rank of a quantile is then off
by at most 0.2 %."""
BINS = 64
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)

Floats = npt.NDArray[np.float64]
T = TypeVar("T")
_Parts = list[tuple[int, torch.Tensor]]
"""(offset in C order, view) of the parts of a tensor."""
UNDERFLOW = 1e-12
"""Spread below which it is computed again in float64: in float32 squared deviations may be 0."""


def statistics_of(tensor: torch.Tensor, entries: int) -> TensorStatistics:
    """Statistics of a readable tensor, with up to `entries` of its extreme elements."""
    parts = list(parts_of(tensor)) if tensor.numel() else []
    readings = _on_host([_read(flat_values(part)) for _, part in parts])
    moments, nonfinite = _combined(parts, readings, entries)
    search = _ExtremesSearch(parts, readings, nonfinite.parts, min(entries, tensor.numel()))
    low, high = _extremes(readings)
    sample = _sample(tensor)
    shape = tuple(tensor.shape)
    return TensorStatistics(
        count=tensor.numel(),
        minimum=low,
        maximum=high,
        mean=moments.mean if moments.count else math.nan,
        std=moments.std,
        norm=moments.norm if moments.count else math.nan,
        zeros=moments.zeros,
        nan=nonfinite.nan,
        positive_inf=nonfinite.positive_inf,
        negative_inf=nonfinite.negative_inf,
        sampled=min(tensor.numel(), sample.taken),
        quantiles=_quantiles(sample.values, low, high),
        histogram=_histogram(sample.values, low, high),
        log_histogram=_log_histogram(sample.values),
        largest=_entries(search.run(largest=True), shape),
        smallest=_entries(search.run(largest=False), shape),
        nonfinite=_entries(nonfinite.first, shape),
    )


def moments_of(tensors: Sequence[torch.Tensor]) -> list[TensorMoments]:
    """Statistics of several readable tensors, with one copy from each device."""
    parts = [list(parts_of(each)) if each.numel() else [] for each in tensors]
    where: dict[torch.device, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for number, each in enumerate(tensors):
        where[each.device] += [(number, part) for _, part in parts[number]]
    readings: list[list[_Reading[float]]] = [[] for _ in tensors]
    for held in where.values():
        found = _on_host([_read(flat_values(part)) for _, part in held])
        for (number, _), reading in zip(held, found, strict=True):
            readings[number].append(reading)
    return [_moments_from(*each) for each in zip(parts, readings, strict=True)]


def _moments_from(parts: _Parts, readings: list[_Reading[float]]) -> TensorMoments:
    moments, nonfinite = _combined(parts, readings, 0)
    known = moments.count > 0
    low, high = _extremes(readings)
    return TensorMoments(
        low,
        high,
        moments.mean if known else math.nan,
        moments.std,
        moments.norm if known else math.nan,
        moments.zeros,
        nonfinite.nan + nonfinite.positive_inf + nonfinite.negative_inf,
    )


def _combined(
    parts: _Parts, readings: list[_Reading[float]], entries: int
) -> tuple[_Moments, _NonFinite]:
    """Combine the readings of all parts of a tensor. Readings that are not finite are replaced by
    those of the finite values, inexact ones by those in float64."""
    moments, nonfinite = _Moments(), _NonFinite(entries)
    for number, (offset, part) in enumerate(parts):
        reading = readings[number]
        if not (math.isfinite(reading.low) and math.isfinite(reading.high)):
            values = flat_values(part)
            finite = torch.isfinite(values)
            nonfinite.add(number, offset, values, finite)
            part = values[finite]
            reading = readings[number] = _on_host([_read(part)])[0]
        underflows = reading.spread < UNDERFLOW and reading.low < reading.high
        if underflows or not (math.isfinite(reading.total) and math.isfinite(reading.spread)):
            reading = readings[number] = _on_host([_read(flat_values(part).double())])[0]
        moments.add(part.numel(), reading)
    return moments, nonfinite


def _extremes(readings: Sequence[_Reading[float]]) -> tuple[float, float]:
    """(lowest value, highest value); nan if there is none."""
    known = [each for each in readings if not math.isnan(each.low)]
    low = min((each.low for each in known), default=math.nan)
    return low, max((each.high for each in known), default=math.nan)


class _Reading(NamedTuple, Generic[T]):
    """Moments of the finite values of one part; nan if there are none."""

    low: T
    high: T
    total: T
    spread: T
    """‖x − mean‖₂"""
    zeros: T


def _read(values: torch.Tensor) -> _Reading[torch.Tensor]:
    if not values.numel():
        nan = torch.tensor(math.nan, device=values.device)
        return _Reading(nan, nan, nan, nan, nan)
    low, high = torch.aminmax(values)
    total = values.sum()
    spread = torch.linalg.vector_norm(values - total / values.numel())
    zeros = values.numel() - torch.count_nonzero(values)
    return _Reading(low, high, total, spread, zeros)


def _on_host(readings: list[_Reading[torch.Tensor]]) -> list[_Reading[float]]:
    """All readings in one copy from the device."""
    if not readings:
        return []
    dtype = torch.float32 if readings[0].low.device.type == "mps" else torch.float64
    stacked = torch.stack([value.to(dtype) for reading in readings for value in reading])
    return [_Reading(*row) for row in stacked.view(len(readings), -1).tolist()]


class _Moments:
    """Mean and sum of squared deviations, combined part by part (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0
        self.zeros = 0

    def add(self, count: int, reading: _Reading[float]) -> None:
        if not count:
            return
        total = self.count + count
        away = reading.total / count - self.mean
        self.squares += reading.spread**2 + away * away * (self.count * count / total)
        self.mean += away * count / total
        self.count = total
        self.zeros += int(reading.zeros)

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else math.nan

    @property
    def norm(self) -> float:
        return math.sqrt(self.squares + self.count * self.mean**2)


class _NonFinite:
    """Counts elements that are not finite, and keeps the first `entries` of them."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.nan = self.positive_inf = self.negative_inf = 0
        self.first: list[tuple[float, int]] = []
        """(value, position in C order)"""
        self.parts: set[int] = set()
        """Indices of the parts that have any."""

    def add(self, number: int, offset: int, values: torch.Tensor, finite: torch.Tensor) -> None:
        self.parts.add(number)
        self.nan += int(torch.isnan(values).sum())
        self.positive_inf += int((values == math.inf).sum())
        self.negative_inf += int((values == -math.inf).sum())
        wanted = self.entries - len(self.first)
        if wanted > 0:
            places = (~finite).nonzero()[:wanted, 0]
            pairs = zip(places.tolist(), values[places].tolist(), strict=True)
            self.first += [(value, offset + place) for place, value in pairs]


# ---------------------------------------------------------------- from the sample


class _Sample(NamedTuple):
    values: Floats
    """The finite elements of the sample, sorted."""
    taken: int
    """Number of elements in the sample, including those that are not finite."""


def _sample(tensor: torch.Tensor) -> _Sample:
    """Evenly spaced elements."""
    values = evenly_spaced(tensor, SAMPLED).to("cpu", copy=True).numpy()
    taken = values.size
    finite = np.isfinite(values)
    if not finite.all():
        values = values[finite]
    values.sort()
    return _Sample(values.astype(np.float64), taken)


def _quantiles(sample: Floats, low: float, high: float) -> tuple[tuple[float, float], ...]:
    if not sample.size:
        return ()
    places = np.array(QUANTILES) * (sample.size - 1)
    below = places.astype(np.int64)
    first, second = sample[below], sample[np.minimum(below + 1, sample.size - 1)]
    inner = zip(QUANTILES, (first + (places - below) * (second - first)).tolist(), strict=True)
    return ((0.0, low), *inner, (1.0, high))


def _histogram(values: Floats, low: float, high: float) -> Histogram:
    if not values.size:
        return Histogram(0.0, 0.0, ())
    width = (high / BINS - low / BINS) or 1.0
    places = ((values - low) / width).astype(np.int64).clip(0, BINS - 1)
    bins = BINS if low < high else 1
    return Histogram(low, high, tuple(np.bincount(places, minlength=bins).tolist()))


def _log_histogram(values: Floats) -> Histogram:
    sizes = np.abs(values)
    sizes = np.log10(sizes[sizes > 0])
    if not sizes.size:
        return Histogram(0.0, 0.0, ())
    return _histogram(sizes, float(sizes.min()), float(sizes.max()))


# ---------------------------------------------------------------- single elements


@dataclass
class _ExtremesSearch:
    """Finds the largest and the smallest finite elements."""

    parts: list[tuple[int, torch.Tensor]]
    readings: list[_Reading[float]]
    nonfinite: set[int]
    """Indices of the parts with elements that are not finite."""
    wanted: int

    def run(self, largest: bool) -> list[tuple[float, int]]:
        """(value, position), the most extreme first. Only parts that may contain one are
        searched."""
        sign = 1.0 if largest else -1.0
        reached = {
            number: sign * (reading.high if largest else reading.low)
            for number, reading in enumerate(self.readings)
            if not math.isnan(reading.low)
        }
        found: list[tuple[float, int]] = []
        for number in sorted(reached, key=lambda number: -reached[number])[: self.wanted]:
            offset, part = self.parts[number]
            values = flat_values(part)
            if number in self.nonfinite:
                values = torch.where(torch.isfinite(values), values, -sign * math.inf)
            top, places = torch.topk(values, min(self.wanted, values.numel()), largest=largest)
            pairs = zip(top.tolist(), places.tolist(), strict=True)
            found += [(value, offset + place) for value, place in pairs if math.isfinite(value)]
        found.sort(key=lambda pair: (-sign * pair[0], pair[1]))
        return found[: self.wanted]


def _entries(found: list[tuple[float, int]], shape: tuple[int, ...]) -> tuple[TensorEntry, ...]:
    """Elements with their indices, from (value, position in C order)."""
    indices = [np.unravel_index(place, shape) if shape else () for _, place in found]
    return tuple(
        TensorEntry(tuple(int(each) for each in index), value)
        for index, (value, _) in zip(indices, found, strict=True)
    )
