"""The envelope theorem: exact first derivatives without a solve, exact second derivatives through the stationary point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from difflayers.errors import ShapeError
from difflayers.implicit import implicit_root, stationary_value


def objective(y: Tensor, x: Tensor) -> Tensor:
    return (torch.logaddexp(y, -y) + (y - x).square() / 2).sum(-1)


minimizer = implicit_root(lambda y, x: torch.tanh(y) + y - x, symmetric=True, batch_ndim=1)


def optimal_value(x: Tensor) -> Tensor:
    return stationary_value(objective, minimizer(torch.zeros_like(x), x), x)


def test_derivatives_to_second_order() -> None:
    x = torch.tensor([[0.3, -1.2], [2.0, 0.1]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(optimal_value, (x,), check_forward_ad=True)
    assert gradgradcheck(optimal_value, (x,))


def test_a_detached_point_would_lose_the_second_derivative() -> None:
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    exact = torch.func.hessian(lambda x: optimal_value(x).sum())(x).reshape(2, 2)
    y = minimizer(torch.zeros_like(x), x)
    wrong = torch.func.hessian(lambda x: objective(y, x).sum())(x).reshape(2, 2)
    slope = 1 / (2 - torch.tanh(y[0]).square())  # ∂y/∂x
    torch.testing.assert_close(exact, torch.diag(1 - slope))
    assert (wrong - exact).abs().max() > 0.3


def test_the_first_derivative_takes_no_solve() -> None:
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64, requires_grad=True)
    solves = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.set_materialize_grads(False)
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            if g is not None:
                solves.append(g)
            return g

    y = Counted.apply(minimizer(torch.zeros_like(x), x))
    (slope,) = torch.autograd.grad(stationary_value(objective, y, x).sum(), x)
    assert not solves
    torch.testing.assert_close(slope, x.detach() - y.detach())


def test_what_the_function_closes_over_is_differentiated() -> None:
    layer = nn.Linear(2, 2).double()
    y = torch.zeros(3, 2, dtype=torch.float64)
    value = stationary_value(lambda y: layer(y).square().sum(-1), y)
    slopes = torch.autograd.grad(value.sum(), list(layer.parameters()))
    torch.testing.assert_close(slopes[1], 6 * layer.bias.detach())
    torch.testing.assert_close(slopes[0], torch.zeros_like(slopes[0]))


def test_the_value_must_be_one_number_for_each_point() -> None:
    with pytest.raises(ShapeError, match="one value for each y"):
        stationary_value(lambda y: y.sum(0), torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="got float"):
        stationary_value(lambda y: 1.0, torch.zeros(3, 2))
