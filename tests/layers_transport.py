"""The transport layers as entries of the registry of layers."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.errors import InfeasibleError, NotConvergedError
from difflayers.solution import Status
from difflayers.transport import SinkhornLayer, sinkhorn, sinkhorn_divergence
from tests.layers import Failure, Function, Inputs, Layer, randn
from tests.reference import newton_root

__all__ = ["TRANSPORT"]


def _marginals(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Marginals made of free numbers, so that their sums agree whatever these are."""
    return left * right.sum(-1, keepdim=True), right * left.sum(-1, keepdim=True)


def _sample(g: torch.Generator) -> Inputs:
    return randn(g, 2, 3, scale=0.3), 0.7 + randn(g, 2, scale=0.05), 0.5 + randn(g, 3, scale=0.05)


def _reference(cost: Tensor, left: Tensor, right: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plan and potentials: the marginal equations without the last one, and the rule for the constant."""
    n = left.shape[-1]

    def plan(x: Tensor, cost: Tensor, epsilon: Tensor) -> Tensor:
        return torch.exp((x[:n, None] + x[n:] - cost) / epsilon)

    def equations(x: Tensor, cost: Tensor, left: Tensor, right: Tensor, epsilon: Tensor) -> Tensor:
        a, b = _marginals(left, right)
        P = plan(x, cost, epsilon)
        gauge = (a * x[:n]).sum() - (b * x[n:]).sum()
        return torch.cat([P.sum(-1) - a, (P.sum(-2) - b)[:-1], gauge.reshape(1)])

    a, b = _marginals(left, right)
    found = sinkhorn(cost.detach(), a.detach(), b.detach(), epsilon=epsilon.detach())
    x = newton_root(equations, torch.cat([found.f, found.g]), cost, left, right, epsilon, steps=1)
    return plan(x, cost, epsilon), x[:n], x[n:]


_FAILURES = (
    Failure("negative", lambda cost, left, right: (cost, left, right - 0.9), InfeasibleError, (Status.PRIMAL_INFEASIBLE,)),
    Failure("NaN", lambda cost, left, right: (cost * torch.nan, left, right), NotConvergedError, (Status.NUMERICAL_ERROR,)),
    Failure("infinite", lambda cost, left, right: (cost + torch.inf, left, right), NotConvergedError, (Status.NUMERICAL_ERROR,)),
)


def _plan(method: str) -> Layer:
    def call(cost: Tensor, left: Tensor, right: Tensor, **options: str) -> Tensor:
        return sinkhorn(cost, *_marginals(left, right), epsilon=0.2, method=method, tol=1e-13, **options).plan

    def limited(iterations: int) -> Function:
        def run(cost: Tensor, left: Tensor, right: Tensor) -> Tensor:
            return sinkhorn(cost, *_marginals(left, right), epsilon=1e-3, method=method, max_iter=iterations, on_failure="warn").plan

        return run

    return Layer(
        f"sinkhorn, {method}",
        call,
        _sample,
        reference=lambda cost, left, right: _reference(cost, left, right, cost.new_tensor(0.2))[0],
        failures=_FAILURES,
        limited=limited,
        heavy=method != "auto",
    )


def _potentials() -> Layer:
    # Everything else that is returned, also as a function of the temperature.
    def call(cost: Tensor, left: Tensor, right: Tensor, epsilon: Tensor, **options: str) -> Tensor:
        found = sinkhorn(cost, *_marginals(left, right), epsilon=epsilon, tol=1e-13, **options)
        return torch.cat([found.f, found.g, found.value.unsqueeze(-1), found.dual_value.unsqueeze(-1)], -1)

    def reference(cost: Tensor, left: Tensor, right: Tensor, epsilon: Tensor) -> Tensor:
        plan, f, g = _reference(cost, left, right, epsilon)
        a, b = _marginals(left, right)
        return torch.cat([f, g, (plan * cost).sum().reshape(1), ((a * f).sum() + (b * g).sum()).reshape(1)])

    return Layer(
        "sinkhorn, potentials",
        call,
        lambda g: (*_sample(g), 0.2 + randn(g, scale=0.01)),
        reference=reference,
        failures=(Failure("temperature", lambda *p: (*p[:3], -p[3]), NotConvergedError, (Status.NUMERICAL_ERROR,)),),
        heavy=True,
    )


def _module() -> Layer:
    def module() -> SinkhornLayer:
        return SinkhornLayer(0.2, tol=1e-13)

    # Squares, because a sum of row and column weights of the plan itself is constant.
    return Layer("SinkhornLayer", lambda cost: module()(cost).square(), lambda g: (randn(g, 3, 2, scale=0.3),), module=module)


def _divergence() -> Layer:
    # Three transport problems of one temperature; the points of both clouds and the weights of one move.
    def call(x: Tensor, y: Tensor, logits: Tensor, **options: str) -> Tensor:
        return sinkhorn_divergence(x, y, logits.softmax(-1), epsilon=0.3, tol=1e-13, **options).value

    return Layer(
        "sinkhorn_divergence",
        call,
        lambda g: (randn(g, 3, 2, scale=0.5), randn(g, 2, 2, scale=0.5), randn(g, 3, scale=0.3)),
        failures=(Failure("NaN", lambda x, y, logits: (x * torch.nan, y, logits), NotConvergedError, (Status.NUMERICAL_ERROR,)),),
        heavy=True,
    )


TRANSPORT: tuple[Layer, ...] = (_plan("auto"), _plan("newton"), _plan("sparse_newton"), _potentials(), _module(), _divergence())
