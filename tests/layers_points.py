"""Transport between point clouds in blocks, as entries of the registry of layers."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.errors import InfeasibleError, NotConvergedError
from difflayers.solution import Status
from difflayers.transport import entropic_map, sinkhorn, sinkhorn_points
from tests.layers import Failure, Function, Inputs, Layer, randn

__all__ = ["POINTS"]


def _sample(g: torch.Generator) -> Inputs:
    return randn(g, 3, 2, scale=0.4), randn(g, 2, 2, scale=0.4), randn(g, 3, scale=0.3), 0.3 + randn(g, scale=0.02)


def _together(f: Tensor, g: Tensor, value: Tensor) -> Tensor:
    return torch.cat([f, g, value.unsqueeze(-1)], -1)


def _points() -> Layer:
    # Blocks of two points, so that there is more than one.
    def call(x: Tensor, y: Tensor, logits: Tensor, epsilon: Tensor, **options: str) -> Tensor:
        found = sinkhorn_points(x, y, logits.softmax(-1), epsilon=epsilon, block_size=2, tol=1e-13, **options)
        return _together(found.f, found.g, found.dual_value)

    def reference(x: Tensor, y: Tensor, logits: Tensor, epsilon: Tensor) -> Tensor:
        cost = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
        found = sinkhorn(cost, logits.softmax(-1), epsilon=epsilon, tol=1e-13)
        return _together(found.f, found.g, found.dual_value)

    def limited(iterations: int) -> Function:
        def run(x: Tensor, y: Tensor, logits: Tensor, epsilon: Tensor) -> Tensor:
            options = {"epsilon": 1e-3 * epsilon, "max_iter": iterations, "tol": 1e-16, "on_failure": "warn"}
            return sinkhorn_points(x, y, logits.softmax(-1), **options).dual_value

        return run

    return Layer(
        "sinkhorn_points",
        call,
        _sample,
        reference=reference,
        failures=(
            Failure("NaN", lambda x, *p: (x * torch.nan, *p), NotConvergedError, (Status.NUMERICAL_ERROR,)),
            Failure("temperature", lambda *p: (*p[:3], -p[3]), NotConvergedError, (Status.NUMERICAL_ERROR,)),
        ),
        limited=limited,
        heavy=True,
    )


def _distances() -> Layer:
    # Another cost, and masses that may be infeasible.
    def call(x: Tensor, y: Tensor, mass: Tensor, **options: str) -> Tensor:
        a, b = mass.unsqueeze(-1) * torch.ones_like(x[..., 0]) / 3, mass.unsqueeze(-1) * torch.ones_like(y[..., 0]) / 2
        return sinkhorn_points(x, y, a, b, epsilon=0.3, cost="euclidean", tol=1e-13, **options).dual_value

    return Layer(
        "sinkhorn_points, euclidean",
        call,
        lambda g: (randn(g, 3, 2, scale=0.4), randn(g, 2, 2, scale=0.4), 1 + randn(g, scale=0.1)),
        failures=(Failure("negative", lambda x, y, mass: (x, y, -mass), InfeasibleError, (Status.PRIMAL_INFEASIBLE,)),),
        heavy=True,
    )


def _map() -> Layer:
    def call(points: Tensor, y: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
        return entropic_map(points, y, g, epsilon=epsilon, block_size=2)

    def reference(points: Tensor, y: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
        weights = ((g.unsqueeze(-2) - (points.unsqueeze(-2) - y).square().sum(-1)) / epsilon).softmax(-1)
        return weights @ y

    return Layer(
        "entropic_map",
        call,
        lambda g: (randn(g, 3, 2, scale=0.4), randn(g, 2, 2, scale=0.4), randn(g, 2, scale=0.1), 0.3 + randn(g, scale=0.02)),
        reference=reference,
    )


POINTS: tuple[Layer, ...] = (_points(), _distances(), _map())
