r"""One scalar equation a row, f(u, θ) = 0 with a bracket, as a root problem of the core.

Projections on curved cones, and soft top-k masks, reduce to one unknown u a row. f changes its sign once, from negative to positive,
between the ends of a bracket. Newton's method takes the step where it stays inside and is at most half as long as the step before the
last; elsewhere the bracket is halved. It cannot fail, and ends with the rounding of f. Derivatives come from the implicit rule, whose
linear system is a division by ∂f/∂u.

Reference: Press, Teukolsky, Vetterling and Flannery, Numerical Recipes, Cambridge 2007, section 9.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...implicit.broadcasting import BroadcastingProblem
from ...implicit.closure import visible_to_modes
from ...implicit.function import solve_implicitly
from ...solution import Solution, Status

__all__ = ["Equation", "scalar_root"]

_MAX_ITER = 120


class Equation(NamedTuple):
    """f(u, θ) = 0, each function row by row: u is ``(*batch, 1)``, and so is what they return.

    Attributes:
        residual: ``(u, *theta) -> f``, increasing through zero; differentiable in u and θ.
        newton: ``(u, *theta) -> (slope, size)``: ∂f/∂u and the sum of the sizes of f's terms, of which an eps is rounding.
        bracket: ``(*theta) -> (lower, upper)``, between which f has its only zero.
    """

    residual: Callable[..., Tensor]
    newton: Callable[..., tuple[Tensor, Tensor]]
    bracket: Callable[..., tuple[Tensor, Tensor]]


def scalar_root(equation: Equation, *theta: Tensor) -> Tensor:
    """The root u of each row, differentiable in ``theta`` to any order.

    Args:
        equation: what u solves.
        theta: each ``(*batch, m)`` with its own m; the first one has the whole batch.

    Returns:
        ``(*batch, 1)``.
    """
    problem = _ScalarRoot(equation, theta[0].dim() - 1, len(theta))
    start, *parts = visible_to_modes([torch.zeros_like(theta[0][..., :1]), *theta])
    return solve_implicitly(problem, start, parts).x


class _ScalarRoot(BroadcastingProblem):
    def __init__(self, equation: Equation, batch_ndim: int, count: int) -> None:
        super().__init__(batch_ndim, residual=equation.residual)
        self.equation, self.core_ndims = equation, (1,) * count

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Solution:
        rows = [part.expand(*x0.shape[:-1], part.shape[-1]).reshape(x0.numel(), part.shape[-1]) for part in theta]
        u, steps = _bracketed_newton(self.equation, rows)
        status = torch.zeros(x0.shape[:-1], dtype=torch.int64, device=x0.device)
        return Solution(u.reshape(x0.shape), status, x0.new_zeros(status.shape), steps.reshape(status.shape))

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        u, *theta = point
        if self._factor is None:
            self._factor = self.equation.newton(u, *theta)[0]
        # A slope that has underflowed belongs to a root that no longer moves what is made of it.
        flat = self._factor == 0
        solved = torch.where(flat, 0, rhs / torch.where(flat, 1, self._factor))
        status = torch.full(rhs.shape[:-1], int(Status.SOLVED), device=rhs.device)
        return Solution(solved, status, rhs.new_zeros(rhs.shape[:-1]), status.clone())

    def deeper(self, size: int) -> _ScalarRoot:
        return _ScalarRoot(self.equation, self.batch_ndim + 1, len(self.core_ndims))


def _bracketed_newton(equation: Equation, theta: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The roots ``(N, 1)`` and the steps ``(N,)`` that each took."""
    lower, upper = equation.bracket(*theta)
    eps = torch.finfo(lower.dtype).eps
    u = torch.where((lower < 0) & (upper > 0), 0, _between(lower, upper))
    last = before_last = upper - lower
    roots, steps = u.clone(), torch.zeros(len(u), dtype=torch.int64, device=u.device)
    rows = torch.arange(len(u), device=u.device)
    for _ in range(_MAX_ITER):
        value = equation.residual(u, *theta)
        slope, size = equation.newton(u, *theta)
        lower, upper = torch.where(value <= 0, u, lower), torch.where(value >= 0, u, upper)
        newton = u - value / slope
        good = (newton >= lower) & (newton <= upper) & ((newton - u).abs() <= before_last.abs() / 2)
        proposed = newton if bool(good.all()) else torch.where(good, newton, _between(lower, upper))
        # At the rounding level of the equation the step is noise, and worth taking only if it is Newton's.
        ended = value.abs() <= eps * size
        proposed = torch.where(ended & ~good, u, proposed)
        before_last, last = last, proposed - u
        u = proposed
        roots[rows], steps[rows] = u, steps[rows] + 1
        running = ~(ended | (last.abs() <= eps * u.abs())).squeeze(-1)
        if not bool(running.any()):
            break
        if not bool(running.all()):
            rows, u, lower, upper, last, before_last, *theta = (
                part[running] for part in (rows, u, lower, upper, last, before_last, *theta)
            )
    return roots, steps


def _between(lower: Tensor, upper: Tensor) -> Tensor:
    """The middle of a bracket that may be hundreds wide around a root near zero: half-way in asinh, the logarithm of what is large."""
    return torch.maximum(lower, torch.minimum(torch.sinh((torch.asinh(lower) + torch.asinh(upper)) / 2), upper))
