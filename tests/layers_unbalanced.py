"""Transport with marginals that may be missed, as entries of the registry of layers."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.errors import InfeasibleError, NotConvergedError
from difflayers.solution import Status
from difflayers.transport import SinkhornLayer, sinkhorn
from tests.layers import Failure, Function, Inputs, Layer, randn
from tests.reference import newton_root

__all__ = ["UNBALANCED"]


def _sample(g: torch.Generator) -> Inputs:
    return randn(g, 2, 3, scale=0.3), 0.7 + randn(g, 2, scale=0.05), 0.5 + randn(g, 3, scale=0.05)


def _reference(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, rho: Tensor) -> Tensor:
    """Plan, potentials and values of one problem: Newton's method on the optimality equations."""

    def plan(x: Tensor, cost: Tensor, epsilon: Tensor) -> Tensor:
        return torch.exp((x[:2, None] + x[2:] - cost) / epsilon)

    def equations(x: Tensor, cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, rho: Tensor) -> Tensor:
        P = plan(x, cost, epsilon)
        return torch.cat([P.sum(-1) - a * torch.exp(-x[:2] / rho), P.sum(-2) - b * torch.exp(-x[2:] / (2 * rho))])

    x = newton_root(equations, torch.zeros_like(torch.cat([a, b])), cost, a, b, epsilon, rho, steps=15)
    P = plan(x, cost, epsilon)
    rows, columns = P.sum(-1), P.sum(-2)
    missed = rho * (rows * (rows / a).log() - rows + a).sum() + 2 * rho * (columns * (columns / b).log() - columns + b).sum()
    total = (P * cost).sum() + epsilon * (P * (P.log() - 1)).sum() + missed + epsilon * (a.sum() + b.sum()) / 2
    return torch.cat([P.flatten(), x, torch.stack([(P * cost).sum(), total])])


def _relaxed() -> Layer:
    def call(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, rho: Tensor, **options: str) -> Tensor:
        found = sinkhorn(cost, a, b, epsilon=epsilon, marginal_penalty=(rho, 2 * rho), tol=1e-13, **options)
        return torch.cat([found.plan.flatten(-2), found.f, found.g, found.value.unsqueeze(-1), found.dual_value.unsqueeze(-1)], -1)

    return Layer(
        "sinkhorn, unbalanced",
        call,
        lambda g: (*_sample(g), 0.2 + randn(g, scale=0.01), 0.6 + randn(g, scale=0.05)),
        reference=_reference,
        failures=(
            Failure("negative", lambda cost, a, *p: (cost, a - 0.9, *p), InfeasibleError, (Status.PRIMAL_INFEASIBLE,)),
            Failure("penalty", lambda *p: (*p[:4], -p[4]), NotConvergedError, (Status.NUMERICAL_ERROR,)),
            Failure("NaN", lambda cost, *p: (cost * torch.nan, *p), NotConvergedError, (Status.NUMERICAL_ERROR,)),
        ),
        heavy=True,
    )


def _one_sided() -> Layer:
    def call(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sinkhorn(cost, a, b, epsilon=0.2, marginal_penalty=(None, 0.5), tol=1e-13).plan

    def limited(iterations: int) -> Function:
        def run(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
            options = {"epsilon": 1e-3, "marginal_penalty": (None, 1.0), "max_iter": iterations, "on_failure": "warn"}
            return sinkhorn(cost, a, b, **options).plan

        return run

    return Layer("sinkhorn, semi-relaxed", call, _sample, limited=limited)


def _module() -> Layer:
    def module() -> SinkhornLayer:
        rho = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        return SinkhornLayer(0.2, marginal_penalty=rho, tol=1e-13)

    return Layer("SinkhornLayer, unbalanced", lambda cost: module()(cost), lambda g: (randn(g, 3, 2, scale=0.3),), module=module)


UNBALANCED: tuple[Layer, ...] = (_relaxed(), _one_sided(), _module())
