"""Systems on a support: the pseudo-inverse, components, and plans on supports that are given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflayers.transport.support import Support, plan_on
from tests.transport.problems import random_cost


def _matrix(mask: Tensor) -> Tensor:
    S = mask.double()
    return torch.cat([torch.cat([S.sum(1).diag(), S], 1), torch.cat([S.T, S.sum(0).diag()], 1)])


def _masks(n: int, m: int) -> Tensor:
    """Dense, sparse, diagonal, empty, and two groups."""
    two = torch.zeros(n, m)
    two[: n // 2, : m // 2] = 1
    two[n // 2 :, m // 2 :] = 1
    masks = [random_cost(n, m) > 0.2, random_cost(n, m, seed=1) > 0.8, torch.eye(n, m), torch.zeros(n, m), two]
    return torch.stack([mask.bool() for mask in masks])


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 9), (9, 5), (1, 4), (3, 1)])
def test_the_pseudo_inverse(n: int, m: int) -> None:
    masks = _masks(n, m)
    rhs = random_cost(len(masks), n + m, 3, seed=2) - 0.5
    found = Support(masks).solve(rhs)
    for mask, b, u in zip(masks, rhs, found, strict=True):
        torch.testing.assert_close(u, torch.linalg.pinv(_matrix(mask), hermitian=True) @ b, atol=1e-11, rtol=1e-9)


def test_long_trees() -> None:
    # A path through all rows and columns: the worst conditioned support.
    n = 150
    mask = torch.eye(n, dtype=torch.bool) | torch.diag(torch.ones(n - 1, dtype=torch.bool), 1)
    rhs = random_cost(1, 2 * n, 1)
    sign = torch.ones(2 * n, 1, dtype=torch.float64)
    sign[n:] = -1
    rhs = rhs - sign * (sign * rhs).mean(1, keepdim=True)
    u = Support(mask[None]).solve(rhs)
    torch.testing.assert_close(_matrix(mask) @ u[0], rhs[0], atol=1e-9, rtol=0)


def test_a_plan_on_a_support() -> None:
    cost, support = random_cost(2, 3), random_cost(2, 3, seed=1) > 0.4
    x = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    plan = plan_on(x, cost, torch.tensor(0.5, dtype=torch.float64), support)
    for i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        assert float(plan[i, j]) == pytest.approx(float(2 * (x[i] + x[2 + j] - cost[i, j])) if support[i, j] else 0.0)
