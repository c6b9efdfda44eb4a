"""The Schur complement: exact where it is regular, alive where it is not."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.transport.laplacian import Laplacian
from tests.transport.problems import random_cost


def _scaled(P: Tensor) -> Tensor:
    return P / P.sum(-1, keepdim=True).sqrt()


def test_against_the_pseudoinverse() -> None:
    P = random_cost(3, 6, 5)
    S = torch.diag_embed(P.sum(-2)) - P.mT @ (P / P.sum(-1, keepdim=True))
    rhs = random_cost(3, 5, 2, seed=1)
    rhs = rhs - rhs.mean(-2, keepdim=True)
    u, residual = Laplacian(_scaled(P), torch.zeros(3, 5, dtype=torch.float64)).refined(rhs)
    exact = torch.linalg.pinv(S) @ rhs
    torch.testing.assert_close(u - u.mean(-2, keepdim=True), exact)
    assert residual.shape == (3, 2)
    assert float(residual.max()) <= 1e-14


def test_groups_that_hardly_touch() -> None:
    # Two columns each; what one group gives to the other is far below the rounding of the diagonal.
    for coupling in (1e-8, 1e-13, 1e-18, 1e-40, 0.0):
        P = torch.full((1, 4, 4), coupling, dtype=torch.float64)
        P[0, :2, :2] = P[0, 2:, 2:] = 0.25
        rhs = torch.tensor([[[1.0], [-1.0], [2.0], [-2.0]]], dtype=torch.float64)
        u, residual = Laplacian(_scaled(P), 1e-20 * P.sum(-2)).refined(rhs)
        assert float(residual) <= 1e-12
        inside = torch.stack([u[0, 0] - u[0, 1], u[0, 2] - u[0, 3]]).squeeze(-1)
        torch.testing.assert_close(inside, torch.tensor([4.0, 8.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_weakly_coupled_single_columns_are_resolved() -> None:
    # A permutation, but for 1e-18 of the mass: there is nothing to cancel, and the potential of each column is found.
    P = torch.eye(3, dtype=torch.float64) + 1e-18
    S = torch.full((3, 3), -2e-18, dtype=torch.float64)
    rhs = torch.tensor([[[3e-18], [0.0], [-3e-18]]], dtype=torch.float64)
    u, _ = Laplacian(_scaled(P.unsqueeze(0)), torch.zeros(1, 3, dtype=torch.float64)).refined(rhs)
    difference = float(u[0, 0] - u[0, 2])
    assert abs(difference / (6e-18 / float(-3 * S[0, 1])) - 1) <= 1e-6


def test_empty_columns() -> None:
    P = random_cost(1, 3, 4)
    P[..., 2] = 0
    shift = torch.tensor([[0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    rhs = torch.tensor([[[1.0], [-0.5], [0.0], [-0.5]]], dtype=torch.float64)
    u, residual = Laplacian(_scaled(P), shift).refined(rhs)
    assert torch.isfinite(u).all()
    assert float(residual) <= 1e-13
