"""The bracketed Newton method: the equations of the cones have the slopes that it is told, and hard ones are solved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

from difflayers.convex.projections import exponential, power
from difflayers.convex.projections.scalar_root import Equation, scalar_root
from tests.convex.projections.checks import rows


@pytest.mark.parametrize("module", [exponential, power])
def test_slopes(module: object) -> None:
    equation = module._EQUATION
    u = (3 * rows(200, seed=0)).requires_grad_()
    theta = [rows(200, seed=k) for k in (1, 2)] + [torch.sigmoid(rows(200, seed=3))]
    (slope,) = torch.autograd.grad(equation.residual(u, *theta).sum(), u)
    torch.testing.assert_close(equation.newton(u.detach(), *theta)[0], slope, rtol=1e-9, atol=1e-12)


# Newton's method alone runs away from the tails of both.
STEEP = Equation(
    lambda u, a: torch.atan(20 * (u - a)),
    lambda u, a: (20 / (1 + 400 * (u - a) ** 2), torch.ones_like(u)),
    lambda a: (torch.full_like(a, -1e3), torch.full_like(a, 1e3)),
)


def test_a_bracket_saves_newton() -> None:
    a = torch.linspace(-300, 300, 41, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(scalar_root(STEEP, a), a, rtol=1e-12, atol=1e-12)


def test_derivatives_and_vmap() -> None:
    # u + u³ = a b
    def residual(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return u + u**3 - a * b

    def bracket(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        end = (a * b).abs() + 1
        return -end, end

    equation = Equation(residual, lambda u, a, b: (1 + 3 * u * u, u.abs() + (a * b).abs()), bracket)

    def root(a: Tensor, b: Tensor) -> Tensor:
        return scalar_root(equation, *torch.broadcast_tensors(a, b))

    a, b = rows(3, 1, seed=4).requires_grad_(), rows(1, 1, seed=5).requires_grad_()
    assert gradcheck(root, (a, b), check_forward_ad=True)
    assert gradgradcheck(root, (a, b), check_fwd_over_rev=True)
    left, right = rows(2, 1, seed=6), rows(3, 1, seed=7)
    nested = vmap(lambda a: vmap(lambda b: scalar_root(equation, a, b))(right))(left)
    loop = torch.stack([torch.stack([scalar_root(equation, a, b) for b in right]) for a in left])
    torch.testing.assert_close(nested, loop)
