"""The group lasso: values against CVXPY, ways to give groups, kinks and refusals."""

from __future__ import annotations

import cvxpy as cp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jacrev

from difflayers.errors import NotConvergedError, ShapeError
from difflayers.prox.operators import prox_group_lasso, prox_l2, soft_threshold
from tests.prox.operators.problems import points, solved

LABELS = torch.tensor([0, 1, 0, 2, 1, 2, 0])
LISTS = [[0, 2, 6], [1, 4], [3, 5]]


@pytest.mark.parametrize("lam", [0.3, 1.2])
def test_solves_its_problem(lam: float) -> None:
    x, w = points(7), points(3, seed=1).abs()
    exact = solved(lambda u: lam * sum(float(w[g]) * cp.norm2(u[LISTS[g]]) for g in range(3)), x)
    torch.testing.assert_close(prox_group_lasso(x, lam, LABELS, w), exact, rtol=0, atol=1e-7)
    assert torch.equal(prox_group_lasso(x, lam, LISTS, w), prox_group_lasso(x, lam, LABELS, w))


@given(st.integers(0, 2**31), st.floats(0, 3))
def test_firmly_nonexpansive_and_one_group_is_the_norm(seed: int, lam: float) -> None:
    x, y = points(2, 7, seed=seed)
    p, q = prox_group_lasso(x, lam, LABELS), prox_group_lasso(y, lam, LABELS)
    assert (p - q).square().sum() <= (p - q) @ (x - y) + 1e-12
    torch.testing.assert_close(prox_group_lasso(x, lam, torch.zeros(7, dtype=torch.int64)), prox_l2(x, lam))
    torch.testing.assert_close(prox_group_lasso(x, lam, torch.arange(7)), soft_threshold(x, lam))


def test_entries_of_no_group_stay() -> None:
    x = points(2, 7)
    p = prox_group_lasso(x, 0.5, [[0, 2], [-1, 4]])
    torch.testing.assert_close(p[:, [1, 3, 5]], x[:, [1, 3, 5]])
    torch.testing.assert_close(p[:, [0, 2]], prox_l2(x[:, [0, 2]], 0.5))
    torch.testing.assert_close(p[:, [6, 4]], prox_l2(x[:, [6, 4]], 0.5))


def test_kinks_nan_and_zero_sizes() -> None:
    zero = torch.zeros(7, dtype=torch.float64)
    torch.testing.assert_close(jacrev(lambda v: prox_group_lasso(v, 0.0, LABELS))(zero), torch.eye(7, dtype=torch.float64))
    assert not jacrev(lambda v: prox_group_lasso(v, 1.0, LABELS))(zero).any()
    rows = torch.stack([zero, zero + torch.nan])
    assert prox_group_lasso(rows, 1.0, LABELS).isnan().any(-1).tolist() == [False, True]
    assert prox_group_lasso(torch.ones(2, 0), 1.0, []).shape == (2, 0)
    assert prox_group_lasso(torch.ones(2, 0), 1.0, torch.zeros(0, dtype=torch.int64)).shape == (2, 0)


def test_refusals() -> None:
    x = points(7)
    with pytest.raises(ShapeError, match="7 integers"):
        prox_group_lasso(x, 1.0, LABELS[:3])
    with pytest.raises(ShapeError, match="7 integers"):
        prox_group_lasso(x, 1.0, LABELS.double())
    with pytest.raises(ShapeError, match="3 groups, got 2"):
        prox_group_lasso(x, 1.0, LABELS, torch.ones(2, dtype=x.dtype))
    with pytest.raises(ShapeError, match="float32"):
        prox_group_lasso(x, 1.0, LABELS, torch.ones(3))
    with pytest.raises(ValueError, match="from 0"):
        prox_group_lasso(x, 1.0, LABELS - 1)
    with pytest.raises(ValueError, match="must not overlap"):
        prox_group_lasso(x, 1.0, [[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="names entry 9"):
        prox_group_lasso(x, 1.0, [[0, 9]])
    with pytest.raises(NotConvergedError, match="lam and weights"):
        prox_group_lasso(x, 1.0, LABELS, torch.tensor([1.0, -1.0, 1.0], dtype=x.dtype))
