"""Thresholds and the largest entries: values against the defining problems, ties, kinks, shapes and refusals."""

from __future__ import annotations

import cvxpy as cp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev, vmap

from difflayers.errors import ConvergenceWarning, NotConvergedError, ShapeError
from difflayers.prox.operators import firm_threshold, hard_threshold, prox_l0, soft_threshold, top_k_abs
from tests.prox.operators.problems import points, solved

GRID = torch.linspace(-6, 6, 240_001, dtype=torch.float64)


def on_a_grid(penalty: Tensor, x: float) -> float:
    """The global minimizer among the points of a fine grid."""
    return float(GRID[(penalty + (GRID - x) ** 2 / 2).argmin()])


def test_soft_threshold_solves_its_problem() -> None:
    x, lam = points(6), points(6, seed=1).abs()
    exact = solved(lambda u: cp.norm1(cp.multiply(lam.numpy(), u)), x)
    torch.testing.assert_close(soft_threshold(x, lam), exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("x", [-3.1, -0.7, 0.0, 0.55, 1.3, 2.49])
def test_the_others_are_global_minimizers(x: float) -> None:
    size, point = GRID.abs(), torch.tensor(x, dtype=torch.float64)
    zeros = (GRID.abs() > 1e-9).double()
    assert abs(float(prox_l0(point, 0.4)) - on_a_grid(0.4 * zeros, x)) < 1e-4
    assert abs(float(hard_threshold(point, 0.6)) - on_a_grid(0.18 * zeros, x)) < 1e-4
    concave = torch.where(size < 2, 0.6 * size - 0.6 * size**2 / 4, 0.6)
    assert abs(float(firm_threshold(point, 0.6, 2.0)) - on_a_grid(concave, x)) < 1e-4


@given(st.floats(-5, 5), st.floats(0, 3))
def test_firm_is_between_soft_and_hard(x: float, lam: float) -> None:
    point = torch.tensor(x, dtype=torch.float64)
    assert torch.equal(firm_threshold(point, lam, float("inf")), soft_threshold(point, lam))
    assert torch.equal(firm_threshold(point, lam, lam), hard_threshold(point, lam))


@given(st.integers(0, 2**31), st.floats(0, 3))
def test_soft_threshold_is_firmly_nonexpansive(seed: int, lam: float) -> None:
    x, y = points(2, 5, seed=seed)
    p, q = soft_threshold(x, lam), soft_threshold(y, lam)
    assert (p - q).square().sum() <= (p - q) @ (x - y) + 1e-12


@given(st.integers(0, 2**31), st.integers(0, 6))
def test_top_k_is_a_nearest_point_with_k_nonzeros(seed: int, k: int) -> None:
    # Small integers, so that there are ties.
    x = torch.randint(-3, 4, (2, 5), generator=torch.Generator().manual_seed(seed)).double()
    p = top_k_abs(x, k)
    assert int((p != 0).sum(-1).max()) <= k
    dropped = x.abs().sort(-1).values[:, : max(5 - k, 0)]
    torch.testing.assert_close((p - x).square().sum(-1), dropped.square().sum(-1))
    assert torch.equal(p, torch.where(p != 0, x, 0))


def test_ties_keep_the_first_entries() -> None:
    x = torch.tensor([2.0, -3.0, 2.0, -2.0, 1.0])
    assert top_k_abs(x, 2).tolist() == [2, -3, 0, 0, 0]
    assert top_k_abs(x, 3).tolist() == [2, -3, 2, 0, 0]
    assert torch.equal(jacrev(lambda v: top_k_abs(v, 3))(torch.zeros(4)), torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])))


def test_at_the_kinks() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    for operator, kept in ((soft_threshold, 0.0), (hard_threshold, 1.0)):
        assert operator(x, 0.0).tolist() == x.tolist()
        slopes = jacrev(lambda v: operator(v, 1.0))(x)  # noqa: B023
        assert torch.equal(slopes, torch.diag(torch.tensor([0.0, kept, kept, 1.0], dtype=torch.float64)))
    for operator in (hard_threshold, prox_l0):
        assert torch.equal(jacrev(lambda v: operator(v, 0.0))(x), torch.eye(4, dtype=torch.float64))  # noqa: B023
    assert torch.equal(hard_threshold(x, 1.0), x)


def test_shapes_broadcast_and_zero_sizes_pass() -> None:
    x, lam = points(2, 3, 4), points(3, 1, seed=1).abs()
    p = soft_threshold(x, lam)
    for i in range(2):
        for j in range(3):
            assert torch.equal(p[i, j], soft_threshold(x[i, j], float(lam[j])))
    assert hard_threshold(x[0, 0, 0], lam).shape == (3, 1)
    mapped = vmap(lambda v: vmap(hard_threshold, (None, 0))(v, lam))(x[:, 0])
    assert torch.equal(mapped, hard_threshold(x[:, :1], lam))
    for operator in (soft_threshold, hard_threshold, prox_l0, top_k_abs):
        assert operator(torch.ones(2, 0), 1).shape == (2, 0)


def test_nan_and_infinity_stay_alone() -> None:
    x = torch.tensor([[1.0, torch.nan, 0.2], [torch.inf, -2.0, 0.1]])
    assert soft_threshold(x, 0.5).nan_to_num(9, posinf=8).tolist() == [[0.5, 9, 0], [8, -1.5, 0]]
    assert hard_threshold(x, 0.5).nan_to_num(9, posinf=8).tolist() == [[1, 9, 0], [8, -2, 0]]
    assert top_k_abs(x, 1).nan_to_num(9, posinf=8).tolist() == [[9, 9, 9], [8, 0, 0]]
    assert soft_threshold(x, torch.inf)[1, 1:].tolist() == [0, 0]


@pytest.mark.parametrize(
    "operator", [soft_threshold, hard_threshold, prox_l0, lambda x, lam, **options: firm_threshold(x, lam, 1.0, **options)]
)
def test_refusals(operator: object) -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="lam must not be negative, got -1"):
        operator(x, -1.0)
    with pytest.raises(ShapeError, match="lam must broadcast"):
        operator(x, torch.ones(2))
    with pytest.raises(ShapeError, match="float64"):
        operator(x, torch.ones(3, dtype=torch.float64))
    with pytest.raises(ShapeError, match="floating"):
        operator(torch.ones(3, dtype=torch.int64), 1.0)
    weights = torch.tensor([0.5, -0.5, 0.0])
    with pytest.raises(NotConvergedError, match="lam must not be negative") as caught:
        operator(x, weights)
    assert caught.value.indices == [(1,)]
    assert operator(x, weights, on_failure="nan").isnan().tolist() == [False, True, False]
    with pytest.warns(ConvergenceWarning):
        operator(x, weights, on_failure="warn")
    with pytest.raises(ValueError, match="on_failure"):
        operator(x, 1.0, on_failure="ignore")


def test_more_refusals() -> None:
    with pytest.raises(ValueError, match="at least lam"):
        firm_threshold(torch.ones(2), 1.0, 0.5)
    with pytest.raises(NotConvergedError, match="larger than mu"):
        firm_threshold(torch.ones(2), 1.0, torch.tensor([2.0, 0.5]))
    with pytest.raises(ValueError, match="k must not"):
        top_k_abs(torch.ones(2), -1)
