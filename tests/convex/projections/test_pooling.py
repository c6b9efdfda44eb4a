"""Blocks of isotonic regressions, batched: as one by one, at all magnitudes, and by logarithms of any range."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from difflayers.convex.projections.pooling import pool, pool_exponentials


def draw(seed: int, rows: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, n))


def one_by_one(y: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    n = y.shape[1]
    found = [isotonic_regression(row, weights=None if weights is None else weights[i]).blocks[:-1] + i * n for i, row in enumerate(y)]
    return np.append(np.concatenate(found), y.size)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (300, 1), (700, 5), (3, 200)])
@pytest.mark.parametrize("weighted", [False, True])
def test_batches_are_pooled_as_one_by_one(shape: tuple[int, int], weighted: bool) -> None:
    y = draw(0, *shape).cumsum(1)
    weights = np.exp(draw(1, *shape)) if weighted else None
    assert np.array_equal(pool(y, weights), one_by_one(y, weights))


def test_rows_of_all_magnitudes_do_not_touch_each_other() -> None:
    y = draw(2, 60, 6) * 10.0 ** np.linspace(-290, 290, 60)[:, None]
    assert np.array_equal(pool(y), one_by_one(y, None))


def test_equal_levels_are_one_block() -> None:
    y = np.array([[0.0, 3, 1, 2, 5], [7, 7, 7, 7, 7], [1, 2, 3, 4, 5]])
    assert pool(y).tolist() == [0, 1, 4, 5, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("pooled", [pool, lambda y: pool_exponentials(y, y)])
def test_nothing_to_pool(pooled) -> None:
    assert pooled(np.empty((0, 3))).tolist() == [0]
    assert pooled(np.empty((3, 0))).tolist() == [0]


@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_exponentials(scale: float) -> None:
    t, log_w = scale * draw(3, 200, 8), draw(4, 200, 8)
    # Each row by its own largest entry: the range of one of them still has room in a float64, unless the scale is large.
    shifted = t - t.max(1, keepdims=True)
    exact = one_by_one(np.exp(shifted), np.exp(log_w)) if scale < 50 else by_definition(t, log_w)
    assert np.array_equal(pool_exponentials(t, log_w), exact)


@pytest.mark.parametrize("step", [2.0, 4.0, 9.0])
def test_rows_that_mostly_rise(step: float) -> None:
    t, log_w = draw(7, 30, 9) + step * np.arange(9), draw(8, 30, 9)
    found = pool_exponentials(t, log_w)
    assert np.array_equal(found, by_definition(t, log_w))
    assert np.array_equal(found, one_by_one(np.exp(t), np.exp(log_w)))


@pytest.mark.parametrize(("scale", "weight_scale"), [(1.0, 400.0), (3000.0, 3000.0), (1e5, 1.0)])
def test_logarithms_of_any_range(scale: float, weight_scale: float) -> None:
    t, log_w = scale * draw(5, 30, 9), weight_scale * draw(6, 30, 9)
    assert np.array_equal(pool_exponentials(t, log_w), by_definition(t, log_w))


def by_definition(t: np.ndarray, log_w: np.ndarray) -> np.ndarray:
    """Blocks of equal p, with p_i = max over a ≤ i of min over b ≥ i of the logarithm of the mean of a … b."""
    starts = []
    for i, (row, weight) in enumerate(zip(t, log_w, strict=True)):
        n = len(row)
        means = np.full((n, n), np.inf)
        for a in range(n):
            for b in range(a, n):
                means[a, b] = np.logaddexp.reduce((row + weight)[a : b + 1]) - np.logaddexp.reduce(weight[a : b + 1])
        p = [max(means[a, k:].min() for a in range(k + 1)) for k in range(n)]
        starts += [i * n + k for k in range(n) if k == 0 or p[k] > p[k - 1] + 1e-12 * (1 + abs(p[k]))]
    return np.append(starts, t.size)
