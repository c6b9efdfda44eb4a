"""Sparse transport as entries of the registry of layers."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.errors import InfeasibleError, NotConvergedError
from difflayers.solution import Status
from difflayers.transport import SparseTransportLayer, sparse_transport
from tests.layers import Failure, Function, Inputs, Layer, randn
from tests.layers_transport import _marginals
from tests.reference import newton_root

__all__ = ["SPARSE_TRANSPORT"]

# Supports with a cycle, because a plan on a tree does not depend on the cost, and far from where they change: all but one entry, and all
# but three, two of each column.
_WIDE = ((0.0, 0.1, 0.9), (0.4, 0.2, 0.0))
_SQUARE = ((0.0, 0.1, 1.0), (0.1, 0.0, 0.3), (1.0, 1.0, 0.0))


def _sample(g: torch.Generator, centre: tuple[tuple[float, ...], ...] = _WIDE) -> Inputs:
    cost = torch.tensor(centre, dtype=torch.float64)
    n, m = cost.shape
    left = cost.new_tensor([0.7, 0.7, 0.5][:n])
    return cost + randn(g, n, m, scale=0.02), left + randn(g, n, scale=0.02), 0.5 + randn(g, m, scale=0.02)


def _reference(cost: Tensor, left: Tensor, right: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plan and potentials: the equations of the support without the last one, and the rule for the constant."""
    n = left.shape[-1]
    a, b = _marginals(left, right)
    found = sparse_transport(cost.detach(), a.detach(), b.detach(), gamma=gamma.detach())
    support = found.plan > 0

    def plan(x: Tensor, cost: Tensor, gamma: Tensor) -> Tensor:
        return torch.where(support, x[:n, None] + x[n:] - cost, 0) / gamma

    def equations(x: Tensor, cost: Tensor, left: Tensor, right: Tensor, gamma: Tensor) -> Tensor:
        a, b = _marginals(left, right)
        T = plan(x, cost, gamma)
        gauge = (a * x[:n]).sum() - (b * x[n:]).sum()
        return torch.cat([T.sum(-1) - a, (T.sum(-2) - b)[:-1], gauge.reshape(1)])

    x = newton_root(equations, torch.cat([found.f, found.g]), cost, left, right, gamma, steps=1)
    return plan(x, cost, gamma), x[:n], x[n:]


_FAILURES = (
    Failure("negative", lambda cost, left, right: (cost, left, right - 0.9), InfeasibleError, (Status.PRIMAL_INFEASIBLE,)),
    Failure("NaN", lambda cost, left, right: (cost * torch.nan, left, right), NotConvergedError, (Status.NUMERICAL_ERROR,)),
    Failure("infinite", lambda cost, left, right: (cost + torch.inf, left, right), NotConvergedError, (Status.NUMERICAL_ERROR,)),
)


def _plan(k: int | None) -> Layer:
    def call(cost: Tensor, left: Tensor, right: Tensor, **options: str) -> Tensor:
        return sparse_transport(cost, *_marginals(left, right), gamma=0.6, k=k, **options).plan

    def limited(iterations: int) -> Function:
        def run(cost: Tensor, left: Tensor, right: Tensor) -> Tensor:
            return sparse_transport(cost, *_marginals(left, right), gamma=1e-3, k=k, max_iter=iterations, on_failure="warn").plan

        return run

    return Layer(
        "sparse_transport" if k is None else f"sparse_transport, k={k}",
        call,
        lambda g: _sample(g, _WIDE if k is None else _SQUARE),
        reference=lambda cost, left, right: _reference(cost, left, right, cost.new_tensor(0.6))[0],
        failures=_FAILURES,
        limited=limited,
        heavy=k is not None,
    )


def _potentials() -> Layer:
    # Everything else that is returned, also as a function of γ.
    def call(cost: Tensor, left: Tensor, right: Tensor, gamma: Tensor, **options: str) -> Tensor:
        found = sparse_transport(cost, *_marginals(left, right), gamma=gamma, **options)
        return torch.cat([found.f, found.g, found.value.unsqueeze(-1), found.dual_value.unsqueeze(-1)], -1)

    def reference(cost: Tensor, left: Tensor, right: Tensor, gamma: Tensor) -> Tensor:
        plan, f, g = _reference(cost, left, right, gamma)
        value = (plan * cost).sum()
        return torch.cat([f, g, value.reshape(1), (value + gamma / 2 * plan.square().sum()).reshape(1)])

    return Layer(
        "sparse_transport, potentials",
        call,
        lambda g: (*_sample(g), 0.6 + randn(g, scale=0.01)),
        reference=reference,
        failures=(Failure("gamma", lambda *p: (*p[:3], -p[3]), NotConvergedError, (Status.NUMERICAL_ERROR,)),),
        heavy=True,
    )


def _module() -> Layer:
    def module() -> SparseTransportLayer:
        return SparseTransportLayer(2.0)

    # Squares, because a sum of row and column weights of the plan itself is constant.
    return Layer("SparseTransportLayer", lambda cost: module()(cost).square(), lambda g: (randn(g, 3, 2, scale=0.2),), module=module)


SPARSE_TRANSPORT: tuple[Layer, ...] = (_plan(None), _plan(2), _potentials(), _module())
