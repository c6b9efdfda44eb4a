"""Soft top-k masks: against a quadratic program and bisection, in their limits, at their edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev, vmap

from difflayers.convex import solve_qp
from difflayers.errors import InfeasibleError, ShapeError
from difflayers.sorting import soft_topk

REGULARIZATIONS = ["l2", "entropic"]
each = pytest.mark.parametrize("regularization", REGULARIZATIONS)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_l2_against_a_quadratic_program() -> None:
    x, strength = rows(20, 5), 0.6
    eye, ones = torch.eye(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for k in range(1, 5):
        total = torch.tensor([float(k)], dtype=torch.float64)
        exact = solve_qp(strength * eye, -x, A=ones.unsqueeze(0), b=total, lb=0 * ones, ub=ones).x
        torch.testing.assert_close(soft_topk(x, k, regularization_strength=strength), exact, rtol=0, atol=1e-9)


def test_entropic_against_bisection() -> None:
    for scale in (0.1, 1.0, 30.0, 1000.0):
        x = scale * rows(8, seed=1)
        for k in (1, 3, 7):
            low, high = -x.max() - 50, -x.min() + 50
            for _ in range(200):
                nu = (low + high) / 2
                low, high = (nu, high) if torch.sigmoid(x + nu).sum() < k else (low, nu)
            found = soft_topk(x, k, regularization="entropic")
            torch.testing.assert_close(found, torch.sigmoid(x + nu), rtol=0, atol=1e-9)
            assert abs(float(found.sum()) - k) <= 1e-12


@each
def test_the_jacobian(regularization: str) -> None:
    x, strength = rows(6, seed=2), 0.7
    jacobian = jacrev(lambda p: soft_topk(p, 2, regularization=regularization, regularization_strength=strength))(x)
    y = soft_topk(x, 2, regularization=regularization, regularization_strength=strength)
    d = y * (1 - y) if regularization == "entropic" else ((y > 0) & (y < 1)).double()
    torch.testing.assert_close(jacobian, (torch.diag(d) - torch.outer(d, d) / d.sum()) / strength, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.float64, st.integers(1, 9), elements=st.floats(-4, 4, width=32)),
    st.integers(0, 9),
    st.floats(1e-3, 1e3),
    st.sampled_from(REGULARIZATIONS),
)
def test_properties(row: np.ndarray, k: int, strength: float, regularization: str) -> None:
    x, k = torch.from_numpy(row), min(k, len(row))
    options = {"regularization": regularization, "regularization_strength": strength}
    y = soft_topk(x, k, **options)
    assert ((y >= 0) & (y <= 1)).all()
    assert abs(float(y.sum()) - k) <= 1e-11
    assert (y[x.argsort()].diff() >= -1e-12).all()
    shuffle = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(soft_topk(x[shuffle], k, **options), y[shuffle], rtol=0, atol=1e-10)
    # What is not among the k smallest is among the n − k largest.
    torch.testing.assert_close(1 - soft_topk(-x, len(row) - k, **options), y, rtol=0, atol=1e-10)


@each
def test_little_strength_marks_and_much_averages(regularization: str) -> None:
    x = rows(4, 7, seed=3)
    marked = torch.zeros_like(x).scatter(-1, x.topk(3).indices, 1.0)
    torch.testing.assert_close(soft_topk(x, 3, regularization=regularization, regularization_strength=1e-4), marked, rtol=0, atol=1e-12)
    averaged = soft_topk(x, 3, regularization=regularization, regularization_strength=1e9)
    torch.testing.assert_close(averaged, torch.full_like(x, 3 / 7), rtol=0, atol=1e-8)


@each
def test_none_and_all_are_constant(regularization: str) -> None:
    for n in (1, 4):
        x = rows(2, n).requires_grad_()
        for k in (0, n):
            y = soft_topk(x, k, regularization=regularization)
            torch.testing.assert_close(y, torch.full_like(x, k / n), rtol=0, atol=0)
            assert not torch.autograd.grad(y.square().sum(), x)[0].any()


@each
def test_a_count_for_each_row(regularization: str) -> None:
    x, k = rows(5, 4, seed=4).requires_grad_(), torch.arange(5)
    call = lambda x, k: soft_topk(x, k, regularization=regularization)  # noqa: E731
    y = call(x, k)
    for i in range(5):
        torch.testing.assert_close(y[i], call(x[i], i), rtol=0, atol=1e-14)
    torch.testing.assert_close(vmap(call)(x, k), y, rtol=0, atol=1e-14)
    torch.testing.assert_close(call(x[0], k), torch.stack([call(x[0], int(i)) for i in k]), rtol=0, atol=1e-14)
    assert gradcheck(lambda x: call(x, k), (x,), check_forward_ad=True)
    assert gradgradcheck(lambda x: call(x, k), (x,))
    with pytest.raises(InfeasibleError, match="out of 0 to n = 4"):
        call(x, torch.tensor([0, 1, 5, 2, 2]))


@each
def test_infinite_entries_are_masked(regularization: str) -> None:
    x = rows(3, 5, seed=5)
    x[:, 1] = -torch.inf
    x[0, 2] = torch.inf
    y = soft_topk(x, 2, regularization=regularization)
    assert not y[:, 1].any()
    assert y[0, 2] == 1
    torch.testing.assert_close(y[1:, [0, 2, 3, 4]], soft_topk(x[1:, [0, 2, 3, 4]], 2, regularization=regularization))
    torch.testing.assert_close(y[0, [0, 3, 4]], soft_topk(x[0, [0, 3, 4]], 1, regularization=regularization))
    (slope,) = torch.autograd.grad(soft_topk(x.requires_grad_(), 2, regularization=regularization).square().sum(), x)
    assert torch.isfinite(slope).all()
    assert not slope[:, 1].any()


@each
def test_ties_far_away_share_what_is_left(regularization: str) -> None:
    for far in (torch.inf, 1e20):
        x = torch.tensor([[0.0, 1.0, -far, -far, -far], [far, far, far, 0.0, 1.0]], dtype=torch.float64)
        found = soft_topk(x, torch.tensor([3, 2]), regularization=regularization)
        exact = torch.tensor([[1, 1, 1 / 3, 1 / 3, 1 / 3], [2 / 3, 2 / 3, 2 / 3, 0, 0]], dtype=torch.float64)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-15)


@each
def test_a_row_with_nan_is_nan_and_its_neighbours_do_not_notice(regularization: str) -> None:
    x = rows(3, 5)
    exact = soft_topk(x, 2, regularization=regularization)
    x[1, 2] = torch.nan
    found = soft_topk(x, 2, regularization=regularization)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], exact[[0, 2]])


@each
def test_other_shapes_and_precision(regularization: str) -> None:
    x = rows(3, 4, 2)
    call = lambda x, dim=-1: soft_topk(x, 2, regularization=regularization, dim=dim)  # noqa: E731
    torch.testing.assert_close(call(x, 1), call(x.mT).mT, rtol=0, atol=0)
    assert call(torch.zeros(0, 4)).shape == (0, 4)
    assert soft_topk(torch.zeros(3, 0), 0, regularization=regularization).shape == (3, 0)
    low = rows(5, 1000).float()
    found = soft_topk(low, 300, regularization=regularization)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().sum(-1), torch.full((5,), 300.0, dtype=torch.float64), rtol=1e-7, atol=0)


def test_what_is_refused() -> None:
    x = torch.zeros(2, 3)
    for k in (-1, 4):
        with pytest.raises(ValueError, match="within 0 and n = 3"):
            soft_topk(x, k)
    for k in (1.0, True, torch.tensor(1.0), torch.tensor(True)):
        with pytest.raises(ShapeError, match="integer"):
            soft_topk(x, k)  # ty: ignore[invalid-argument-type]
    with pytest.raises(ShapeError, match="batch of x"):
        soft_topk(x, torch.tensor([1, 1, 1]))
    with pytest.raises(ShapeError, match="int64"):
        soft_topk(torch.arange(3), 1)
    with pytest.raises(ValueError, match="kl"):
        soft_topk(x, 1, regularization="kl")  # ty: ignore[invalid-argument-type]
