"""Weights of integrals over a mesh."""

from __future__ import annotations

import pytest
import torch

from difflayers.errors import ShapeError
from difflayers.pde import riemann_weights, trapezoid_weights

x = torch.tensor([0.0, 0.3, 0.7, 1.5, 2.0], dtype=torch.float64)
y = torch.linspace(-1, 1, 4, dtype=torch.float64)


def test_trapezoid() -> None:
    u = torch.sin(x)
    torch.testing.assert_close(trapezoid_weights(x) @ u, torch.trapezoid(u, x))
    field = torch.outer(u, y.exp())
    torch.testing.assert_close((trapezoid_weights(x, y) * field).sum(), torch.trapezoid(torch.trapezoid(field, y), x))


def test_riemann() -> None:
    u = torch.sin(x)
    torch.testing.assert_close(riemann_weights(x) @ u, (x.diff() * u[1:]).sum())
    torch.testing.assert_close(riemann_weights(x, side="left") @ u, (x.diff() * u[:-1]).sum())
    both = riemann_weights(x, y) + riemann_weights(x, y, side="left")
    assert both.shape == (5, 4)
    torch.testing.assert_close((riemann_weights(x) + riemann_weights(x, side="left")) / 2, trapezoid_weights(x))


def test_derivative_in_the_coordinates() -> None:
    assert torch.autograd.gradcheck(trapezoid_weights, (x.clone().requires_grad_(), y.clone().requires_grad_()))


def test_refuses() -> None:
    for wrong in ((), (x[:1],), (torch.arange(4),), (torch.ones(2, 3),)):
        with pytest.raises(ShapeError, match=r"coordinates"):
            trapezoid_weights(*wrong)
    with pytest.raises(ValueError, match="side"):
        riemann_weights(x, side="middle")  # ty: ignore[invalid-argument-type]
