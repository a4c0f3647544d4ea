"""Statistics and heat maps against numpy, over shapes, types and parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.examples import examples
from tui_trainer.inspector import tensor_catalog, tensor_statistics
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.heat_map import heat_map
from tui_trainer.inspector.tensor_catalog import evenly_spaced, readable
from tui_trainer.inspector.tensor_statistics import statistics_of
from tui_trainer.protocol.heat_map import HeatMap, HeatMapWindow
from tui_trainer.protocol.inspection import TensorStatistics


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of seven elements, so that small tensors have many."""
    monkeypatch.setattr(tensor_catalog, "CPU_ELEMENTS", 7)


def cells(heat: HeatMap) -> np.ndarray:
    return np.frombuffer(heat.cells, "<f4").reshape(heat.rows, heat.columns)


def assert_matches(found: TensorStatistics, expected: np.ndarray) -> None:
    """Compare with numpy in float64."""
    flat = expected.astype(np.float64).reshape(-1)
    finite = flat[np.isfinite(flat)]
    assert found.count == flat.size
    assert found.nan == np.isnan(flat).sum()
    assert found.positive_inf == (flat == np.inf).sum()
    assert found.negative_inf == (flat == -np.inf).sum()
    if not finite.size:
        assert math.isnan(found.minimum)
        assert math.isnan(found.mean)
        assert found.largest == found.smallest == ()
        return
    assert found.minimum == finite.min()
    assert found.maximum == finite.max()
    scale = np.abs(finite).max()
    assert found.mean == pytest.approx(finite.mean(), rel=1e-5, abs=1e-6 * scale)
    assert found.std == pytest.approx(finite.std(), rel=1e-5, abs=1e-6 * scale)
    assert found.norm == pytest.approx(np.linalg.norm(finite), rel=1e-5)
    assert found.zeros == (finite == 0).sum()
    for q, value in found.quantiles:
        assert value == pytest.approx(np.quantile(finite, q), rel=1e-5, abs=1e-6 * scale)
    assert sum(found.histogram.counts) == finite.size
    assert sum(found.log_histogram.counts) == (finite != 0).sum()
    largest = np.sort(finite)[::-1][: len(found.largest)]
    assert [each.value for each in found.largest] == largest.tolist()
    assert [each.value for each in found.smallest] == np.sort(finite)[: len(largest)].tolist()
    for entry in (*found.largest, *found.smallest):
        assert expected[entry.index] == entry.value
    for entry in found.nonfinite:
        assert not np.isfinite(expected[entry.index])


@pytest.mark.parametrize(
    "shape", [(), (1,), (40,), (6, 9), (3, 4, 5), (1, 33), (50, 1), (2, 1, 3, 4)]
)
@pytest.mark.usefixtures("small_parts")
def test_every_shape(shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert_matches(statistics_of(tensor, 5), tensor.numpy())


@pytest.mark.usefixtures("small_parts")
def test_views_that_are_not_contiguous():
    whole = torch.randn(8, 10, 6, generator=torch.Generator().manual_seed(2))
    for view in (
        whole.transpose(0, 2),
        whole[::2, 1:, ::3],
        whole[0].T,
        whole[:, 3].expand(3, 8, 6),
    ):
        assert_matches(statistics_of(view, 4), view.numpy())


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.int8, torch.int64, torch.uint8, torch.bool],
    ids=str,
)
def test_every_type(dtype):
    tensor = (torch.randn(13, 7, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)
    assert_matches(statistics_of(tensor, 5), tensor.numpy().astype(np.float64))


def test_bfloat16_and_complex_numbers():
    tensor = torch.randn(13, 7, generator=torch.Generator().manual_seed(3))
    half = tensor.bfloat16()
    assert_matches(statistics_of(half, 5), half.float().numpy())
    turned = torch.complex(tensor, tensor.flip(0))
    assert_matches(statistics_of(turned, 5), turned.abs().numpy())


@settings(max_examples=examples(60))
@given(
    st.lists(
        st.one_of(
            st.floats(-1e3, 1e3, width=32),
            st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-30]),
        ),
        min_size=1,
        max_size=60,
    )
)
@example([0.0, 1e-30])
def test_what_is_not_finite_is_counted_and_left_out(numbers):
    tensor = torch.tensor(numbers, dtype=torch.float32)
    before, tensor_catalog.CPU_ELEMENTS = tensor_catalog.CPU_ELEMENTS, 11
    try:
        found = statistics_of(tensor, 3)
    finally:
        tensor_catalog.CPU_ELEMENTS = before
    assert_matches(found, tensor.numpy())
    assert len(found.nonfinite) == min(3, found.not_finite)


def test_an_empty_tensor_has_no_statistics():
    found = statistics_of(torch.empty(0, 3), 3)
    assert found.count == found.sampled == 0
    assert math.isnan(found.minimum)
    assert found.quantiles == found.largest == found.nonfinite == ()


def test_a_large_tensor_is_sampled_evenly(monkeypatch):
    monkeypatch.setattr(tensor_statistics, "SAMPLED", 1000)
    generator = torch.Generator().manual_seed(4)
    # The columns differ, and their number is a multiple of every small stride.
    tensor = torch.randn(500, 60, generator=generator) + torch.arange(60) / 10
    for view in (tensor, tensor.T.contiguous().T):
        found = statistics_of(view, 0)
        assert 500 < found.sampled <= 1000
        exact = tensor.numpy()
        assert found.minimum == exact.min()
        assert found.mean == pytest.approx(exact.mean(), rel=1e-5)
        for q, value in found.quantiles[2:-2]:
            below = (exact <= value).mean()
            assert abs(below - q) < 0.06


def test_a_sample_is_not_in_step_with_the_rows():
    tensor = torch.arange(64).repeat(1000, 1)
    sample = evenly_spaced(tensor, 2000)
    assert len(set(sample.tolist())) == 64


# ---------------------------------------------------------------- heat maps


def blocks(matrix: np.ndarray, height: int, width: int, reduction: str) -> np.ndarray:
    """The slow way."""
    rows, columns = matrix.shape
    reduce = {
        "mean_abs": lambda part: np.abs(part).mean(),
        "mean": lambda part: part.mean(),
        "max_abs": lambda part: np.abs(part).max(),
    }[reduction]
    return np.array(
        [
            [reduce(matrix[r : r + height, c : c + width]) for c in range(0, columns, width)]
            for r in range(0, rows, height)
        ]
    )


@settings(max_examples=examples(80))
@given(
    shape=st.tuples(st.integers(2, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    reduction=st.sampled_from(["mean_abs", "mean", "max_abs"]),
    part=st.sampled_from([5, 16, 64, 1 << 20]),
    transposed=st.booleans(),
    corner=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_heat_maps_of_any_window(shape, size, reduction, part, transposed, corner):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    tensor = tensor.T.contiguous().T if transposed else tensor
    before, tensor_catalog.CPU_ELEMENTS = tensor_catalog.CPU_ELEMENTS, part
    try:
        window = HeatMapWindow(
            *size, row_from=corner[0], column_from=corner[1], reduction=reduction
        )
        heat = heat_map(tensor, window)
    finally:
        tensor_catalog.CPU_ELEMENTS = before
    assert heat.matrix == shape
    assert heat.rows <= size[0]
    assert heat.columns <= size[1]
    shown = tensor.numpy()[heat.row_from : heat.row_to, heat.column_from : heat.column_to]
    expected = blocks(shown.astype(np.float64), heat.block_rows, heat.block_columns, reduction)
    np.testing.assert_allclose(cells(heat), expected, rtol=1e-5, atol=1e-6)


def test_one_dimension_is_shown_in_reading_order():
    tensor = torch.arange(100.0)
    heat = heat_map(tensor, HeatMapWindow(4, 10, reduction="mean"))
    assert heat.lines
    assert (heat.block_columns, heat.rows, heat.columns) == (3, 4, 10)
    shown = cells(heat).reshape(-1)
    assert shown[:33].tolist() == [3 * i + 1 for i in range(33)]
    assert shown[33] == 99
    assert np.isnan(shown[34:]).all()
    near = heat_map(tensor, HeatMapWindow(4, 10, column_from=20, column_to=25, reduction="mean"))
    assert cells(near).tolist() == [[20, 21, 22, 23, 24]]


def test_further_dimensions_become_columns():
    tensor = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(6))
    heat = heat_map(tensor, HeatMapWindow(100, 100, reduction="mean"))
    np.testing.assert_allclose(cells(heat), tensor.reshape(4, 12).numpy(), rtol=1e-6)
    assert heat_map(torch.tensor(2.5), HeatMapWindow(5, 5)).cells == np.float32(2.5).tobytes()


@pytest.mark.parametrize("part", [7, 12, 1 << 20])
def test_without_a_view_only_the_parts_in_work_are_copied(monkeypatch, part):
    monkeypatch.setattr(tensor_catalog, "CPU_ELEMENTS", part)
    tensor = torch.randn(5, 3, 2, 4, generator=torch.Generator().manual_seed(6))
    last = tensor.contiguous(memory_format=torch.channels_last)
    window = HeatMapWindow(3, 7, row_from=1, column_from=2, column_to=23)
    with LargestCopy(last) as largest:
        heat = heat_map(last, window)
    np.testing.assert_allclose(cells(heat), cells(heat_map(tensor, window)), rtol=1e-6)
    assert largest.elements <= 3 * part  # of the indices in three dimensions


class LargestCopy(TorchDispatchMode):
    """Notes the size of the largest result that is no view of a tensor."""

    def __init__(self, tensor):
        super().__init__()
        self.elements, self._storage = 0, tensor.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copied = isinstance(result, torch.Tensor)
        if copied and result.untyped_storage().data_ptr() != self._storage:
            self.elements = max(self.elements, result.numel())
        return result


def test_a_block_with_a_nan_shows_it():
    tensor = torch.ones(8, 8)
    tensor[5, 6] = math.nan
    tensor[0, 0] = math.inf
    shown = cells(heat_map(tensor, HeatMapWindow(4, 4)))
    assert np.isnan(shown[2, 3])
    assert shown[0, 0] == math.inf
    assert np.isfinite(shown).sum() == 14


@pytest.mark.parametrize(
    "window", [HeatMapWindow(0, 4), HeatMapWindow(4, 0), HeatMapWindow(1 << 10, 1 << 10)]
)
def test_an_impossible_heat_map_is_refused(window):
    with pytest.raises(InspectionError, match="cells"):
        heat_map(torch.ones(3, 3), window)


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (lambda: torch.empty(3, device="meta"), "meta device"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_plain_elements_is_refused_with_the_reason(tensor, why):
    with pytest.raises(InspectionError, match=why):
        readable(tensor())
