"""What the minimizers share: an objective on rows, and the length of the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..pytree import Raveler
from .linearize import value_and_grad
from .loop import norm

__all__ = ["ROUNDING", "first_stepsize", "objective_on_rows"]

# Differences of f below this multiple of eps |f| say nothing: f is a sum whose terms may be larger than itself.
ROUNDING = 1e3


def objective_on_rows(fun: Callable[[Any], Tensor], x0: Any, batch_ndim: int) -> tuple[Raveler, Callable[[Tensor], Tensor], Tensor]:
    """The unknowns as rows and the objective on them, checked to give one value per row."""
    raveler = Raveler(x0, batch_ndim)
    x = raveler.ravel(x0)
    batch = x.shape[:-1]

    def objective(matrix: Tensor) -> Tensor:
        value = fun(raveler.unravel(matrix))
        if not isinstance(value, Tensor) or value.shape != batch:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"the objective must return one value per problem, shape {tuple(batch)} with batch_ndim={batch_ndim}, got {came}"
            )
        return value

    return raveler, objective, x


def first_stepsize(objective: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, stepsize: float | None) -> Tensor:
    """1/L from the change of the gradient along itself; the curvature of most functions shows best there."""
    if stepsize is not None:
        if not stepsize > 0:
            raise ValueError(f"stepsize must be positive, got {stepsize}")
        return torch.full_like(gradient[..., 0], stepsize)
    size, reach = norm(gradient), norm(x)
    distance = torch.finfo(x.dtype).eps ** 0.5 * torch.where(reach > 0, reach, 1)
    direction = gradient / torch.where(size > 0, size, 1)[..., None]
    _, beyond = value_and_grad(objective, x - distance[..., None] * direction)
    curvature = norm(beyond - gradient) / distance
    # Where f is linear or not finite there, any stepsize is as good: one that moves x by its own length.
    usual = torch.where(reach > 0, reach, 1) / torch.where(size > 0, size, 1)
    return torch.where(torch.isfinite(curvature) & (curvature > 0), 1 / curvature, usual)
