"""The group sparse envelope: value and operator against CVXPY, certified by Fenchel's equality; limits, kinks and refusals."""

from __future__ import annotations

from collections.abc import Sequence

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev

from difflayers.errors import NotConvergedError, ShapeError
from difflayers.prox.operators import group_sparse_envelope, prox_group_sparse
from tests.prox.operators.problems import points, solved

SINGLE = [[i] for i in range(7)]
LISTS = [[0, 2, 6], [1, 4], [3, 5]]
WEIGHTS = points(3, seed=9).abs() + 0.1


def conjugate(y: Tensor, k: int, groups: Sequence[Sequence[int]], d: Tensor) -> Tensor:
    """S*(y): half the sum of the k largest ‖y_g‖² / d_g."""
    squares = torch.stack([y[..., list(g)].square().sum(-1) / d[j] for j, g in enumerate(groups)], -1)
    return squares.sort(-1, descending=True).values[..., :k].sum(-1) / 2


def variational(u: cp.Variable, k: int, groups: Sequence[Sequence[int]], d: Tensor) -> tuple[cp.Expression, list[cp.Constraint]]:
    shares = cp.Variable(len(groups))
    terms = [float(d[j]) * cp.quad_over_lin(u[list(g)], shares[j]) / 2 for j, g in enumerate(groups)]
    return sum(terms), [shares >= 0, shares <= 1, cp.sum(shares) <= k]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("lam", [0.3, 2.0])
def test_solves_its_problem(lam: float, k: int) -> None:
    x = points(7)
    # The dual problem, which CVXPY solves to more digits: the sum of the k largest squares.
    dual = solved(lambda y: cp.sum_largest(cp.square(y), k) / (2 * lam), x)
    torch.testing.assert_close(prox_group_sparse(x, lam, k), x - dual, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_groups_reach_the_value_of_the_problem(k: int) -> None:
    x, lam = points(7, seed=1), 0.7
    p = prox_group_sparse(x, lam, k, LISTS, WEIGHTS)
    u = cp.Variable(7)
    value, constraints = variational(u, k, LISTS, WEIGHTS)
    problem = cp.Problem(cp.Minimize(lam * value + cp.sum_squares(u - x.numpy()) / 2), constraints)
    least = problem.solve(solver=cp.CLARABEL)
    found = lam * group_sparse_envelope(p, k, LISTS, WEIGHTS) + (p - x).square().sum() / 2
    assert abs(float(found) - least) < 1e-6
    fixed = cp.Problem(cp.Minimize(value), [*constraints, u == x.numpy()])
    assert abs(float(group_sparse_envelope(x, k, LISTS, WEIGHTS)) - fixed.solve(solver=cp.CLARABEL)) < 1e-6


@given(st.integers(0, 2**31), st.floats(1e-3, 30), st.integers(1, 7), st.booleans())
def test_fenchel_equality_certifies_value_and_operator(seed: int, lam: float, k: int, grouped: bool) -> None:
    groups, d = (LISTS, WEIGHTS) if grouped else (SINGLE, torch.ones(7, dtype=torch.float64))
    # Entries of several sizes, some of them zero or equal.
    generator = torch.Generator().manual_seed(seed)
    x = points(7, seed=seed) * torch.tensor([1e-3, 0.0, 1.0, 1.0, 1e3], dtype=torch.float64)[torch.randint(0, 5, (7,), generator=generator)]
    p = prox_group_sparse(x, lam, k, groups, d)
    y = (x - p) / lam
    gap = group_sparse_envelope(p, k, groups, d) + conjugate(y, k, groups, d) - p @ y
    assert abs(float(gap)) <= 1e-11 * max(float(p.square().sum() + y.square().sum()), 1e-30)


@given(st.integers(0, 2**31), st.floats(0, 3), st.integers(1, 4))
def test_firmly_nonexpansive(seed: int, lam: float, k: int) -> None:
    x, y = points(2, 7, seed=seed)
    p, q = prox_group_sparse(x, lam, k), prox_group_sparse(y, lam, k)
    assert (p - q).square().sum() <= (p - q) @ (x - y) + 1e-12


def test_limits() -> None:
    x = points(5, 7)
    torch.testing.assert_close(prox_group_sparse(x, 0.7, 7), x / 1.7)
    torch.testing.assert_close(group_sparse_envelope(x, 7), x.square().sum(-1) / 2)
    torch.testing.assert_close(group_sparse_envelope(x, 1), x.abs().sum(-1).square() / 2)
    for row in x:
        exact = solved(lambda u: 0.35 * cp.square(cp.norm1(u)), row)
        torch.testing.assert_close(prox_group_sparse(row, 0.7, 1), exact, rtol=0, atol=1e-6)
    by_labels = torch.tensor([0, 1, 0, 2, 1, 2, 0])
    torch.testing.assert_close(prox_group_sparse(x, 0.7, 2, by_labels, WEIGHTS), prox_group_sparse(x, 0.7, 2, LISTS, WEIGHTS))
    nonzero = (prox_group_sparse(x, 0.7, 2) != 0).sum(-1)
    assert int(nonzero.min()) >= 2
    assert int(nonzero.max()) > 2


def test_kinks() -> None:
    identity = torch.eye(4, dtype=torch.float64)
    x = torch.tensor([1.0, 0.0, 0.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(jacrev(lambda v: prox_group_sparse(v, 0.0, 2))(x), identity)
    # With fewer than k nonzeros a small entry is only scaled; with k it stays zero.
    torch.testing.assert_close(jacrev(lambda v: prox_group_sparse(v, 0.5, 3))(x), identity / 1.5)
    torch.testing.assert_close(jacrev(lambda v: prox_group_sparse(v, 0.5, 2))(x), torch.diag(x.abs().sign()) / 1.5)
    assert jacrev(jacrev(lambda v: group_sparse_envelope(v, 2)))(x).isfinite().all()
    slopes = jacrev(lambda v: group_sparse_envelope(v, 2, [[0, 1], [2], [3]]))(0 * x)
    assert torch.equal(slopes, 0 * x)


def test_batches_of_weights_nan_and_zero_sizes() -> None:
    x, lam = points(2, 3, 7), points(3, seed=1).abs()
    p = prox_group_sparse(x, lam, 2)
    for j in range(3):
        torch.testing.assert_close(p[:, j], prox_group_sparse(x[:, j], float(lam[j]), 2))
    free = prox_group_sparse(x, 0.5, 1, [[0, 2], [1, 4]])
    torch.testing.assert_close(free[..., [3, 5, 6]], x[..., [3, 5, 6]])
    rows = torch.stack([x[0, 0], x[0, 0] * torch.nan])
    assert prox_group_sparse(rows, 0.5, 2).isnan().all(-1).tolist() == [False, True]
    assert prox_group_sparse(torch.ones(2, 0), 1.0, 1).shape == (2, 0)
    assert group_sparse_envelope(torch.ones(2, 0), 1).tolist() == [0, 0]


def test_refusals() -> None:
    x = points(7)
    with pytest.raises(ValueError, match="at least 1"):
        prox_group_sparse(x, 1.0, 0)
    with pytest.raises(ValueError, match="negative, got -1"):
        prox_group_sparse(x, -1.0, 2)
    with pytest.raises(ShapeError, match="weights"):
        prox_group_sparse(x, 1.0, 2, LISTS, WEIGHTS[:2])
    with pytest.raises(NotConvergedError, match="lam and weights"):
        prox_group_sparse(x, 1.0, 2, LISTS, -WEIGHTS)
    assert np.isnan(float(group_sparse_envelope(x, 2, LISTS, -WEIGHTS)))
