"""The statistics of a batch, against plain float64 ones of the whole tensors."""

from __future__ import annotations

import math

import pytest
import torch

from tui_trainer.history.records import BatchTensor
from tui_trainer.probes.batch import SAMPLE, SeenTensor, copied_of, statistics


def measured(tensor: torch.Tensor, ignored: int | None = None) -> BatchTensor:
    copied, reading = copied_of(tensor, ignored)
    whole = copied[0] * copied[1] == tensor.numel()
    seen = SeenTensor("input", "", tuple(tensor.shape), "float", 0, ignored, copied, whole)
    assert reading.numel() == seen.readings <= SAMPLE + 128
    return statistics(seen, reading.double().numpy())


@pytest.mark.parametrize("shape", [(6, 5), (700, 3, 8, 8), (40_000,), (3, 90_000), (), (1, 9)])
def test_range_and_moments(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 2
    found = measured(x)
    assert found.low == float(x.min())
    assert found.high == float(x.max())
    close = 1e-6 if x.numel() <= SAMPLE else 0.2
    assert found.mean == pytest.approx(float(x.double().mean()), abs=close)
    assert found.std == pytest.approx(float(x.double().std(correction=0)), abs=close)
    assert not found.same_rows
    assert found.left_out == 0


@pytest.mark.parametrize("rows", [8, 5000])
def test_equal_rows(rows):
    row = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    x = row.expand(rows, 3, 7).clone()
    assert measured(x).same_rows
    x[-1, 2, 6] += 1
    assert not measured(x).same_rows


@pytest.mark.parametrize("count", [64, 50_000])
def test_the_checksum_tells_batches_apart(count):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[count // 2 + 1, 3] += 1e-3
    assert measured(x).checksum == measured(x.clone()).checksum
    assert measured(x).checksum != measured(other).checksum


@pytest.mark.parametrize("count", [64, 50_000])
def test_ignored_targets_are_left_out(count):
    labels = torch.arange(count) % 10
    labels[::4] = -100
    found = measured(labels, ignored=-100)
    assert (found.low, found.high) == (0, 9) if count > 64 else (found.low >= 0)
    assert found.left_out == int((labels == -100).sum())
    none = measured(torch.full((count,), -100), ignored=-100)
    assert none.left_out == count


@pytest.mark.parametrize("count", [64, 50_000])
def test_values_that_are_not_finite_are_left_out(count):
    x = torch.ones(count, 2)
    x[0, 0], x[0, 1] = math.inf, math.nan
    found = measured(x)
    assert (found.low, found.high, found.mean, found.std) == (1, 1, 1, 0)
    assert found.left_out > 0


def test_images_in_channels_last():
    x = torch.randn(300, 3, 16, 16).to(memory_format=torch.channels_last)
    found = measured(x)
    assert (found.low, found.high) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("count", [30, 30_000])
def test_any_type(kind, count):
    found = measured((torch.arange(count) % 2).to(kind))
    assert (found.low, found.high) == (0, 1)
