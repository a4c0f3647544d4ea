"""Heads' weights against numpy, and angles that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tui_trainer.inspector.attention.heads import head_spectra, head_weights, principal_angles


def matrices(seed=0, heads=3, dim=4, width=10):
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, dim, width)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))


def test_each_head_against_numpy():
    found = matrices()
    for head, weights in enumerate(head_weights(found)):
        q, k, v = (each[head].numpy() for each in found)
        for place, (a, b) in enumerate(((q, k), (q, v), (k, v))):
            cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
            distance = np.linalg.norm(a - b) / np.hypot(np.linalg.norm(a), np.linalg.norm(b))
            assert weights.cosines[place] == pytest.approx(cosine)
            assert weights.distances[place] == pytest.approx(distance)
            bases = [np.linalg.qr(each.T)[0] for each in (a, b)]
            angles = np.arccos(np.clip(np.linalg.svd(bases[0].T @ bases[1])[1], -1, 1))
            assert weights.angles[place] == pytest.approx(np.degrees(angles).mean())
            assert head_spectra(found, head).angles[place] == pytest.approx(np.degrees(angles))
        for place, each in enumerate((q, k, v)):
            singular = np.linalg.svd(each)[1]
            assert weights.largest[place] == pytest.approx(singular[0])
            assert weights.stable_ranks[place] == pytest.approx(
                (singular**2).sum() / singular[0] ** 2
            )
            assert head_spectra(found, head).singular[place] == pytest.approx(singular)
    assert head_weights(found, 1) == [head_weights(found)[1]]


def test_angles_that_are_known():
    e = torch.eye(4, dtype=torch.float64)
    assert principal_angles(e[:2], e[:2]).tolist() == [0, 0]
    assert principal_angles(e[:2], e[2:]).tolist() == pytest.approx([90, 90])
    turned = math.cos(1e-9) * e[0] + math.sin(1e-9) * e[1]
    assert principal_angles(e[:1], turned[None]).tolist() == pytest.approx([math.degrees(1e-9)])
    both = torch.stack([e[0], (e[1] + e[2]) / math.sqrt(2)])
    assert principal_angles(e[:2], both).tolist() == pytest.approx([0, 45], abs=1e-12)


def test_angles_of_matrices_of_lower_rank_and_other_widths():
    e = torch.eye(4, dtype=torch.float64)
    doubled = torch.stack([e[0], 2 * e[0], 0 * e[0]])
    assert principal_angles(doubled, e[:2]).tolist() == pytest.approx([0], abs=1e-12)
    assert principal_angles(torch.zeros(2, 4, dtype=torch.float64), e).numel() == 0
    assert principal_angles(e, torch.eye(3, dtype=torch.float64)).numel() == 0


def test_weights_that_are_not_finite_are_not_compared():
    q, k, v = matrices()
    q[1, 0, 0] = math.nan
    assert all(math.isnan(x) for x in head_weights((q, k, v))[1].cosines)
    assert head_spectra((q, k, v), 1) is None
    assert math.isfinite(head_weights((q, k, v))[0].cosines[0])
