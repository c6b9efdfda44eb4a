"""L-BFGS for smooth unconstrained minimization, a batch at a time.

The direction is d = −H ∇f(x) with the inverse Hessian estimate H of the last ``memory`` pairs (step, change of gradient), applied by
the two-loop recursion. The step along d satisfies the weak Wolfe conditions: f falls by at least c₁ of what its slope promises,
and the slope shrinks to less than c₂ of what it was, so that every pair has positive curvature. It is found by bracketing and
bisection, one trial point per iteration, each row with its own bracket. Close to the minimum, where f no longer shows its
decrease, the slope at the trial point stands in for it (the approximate Wolfe condition).

A row has converged when a gradient step of length 1/L would move x by no more than ``tol`` relative to its norm, L being the largest
curvature sᵀy/sᵀs of the pairs.

References: Liu and Nocedal, Math. Program. 45, 1989; Lewis and Overton, Math. Program. 141, 2013 (the line search);
Hager and Zhang, SIAM J. Optim. 16, 2005 (the approximate Wolfe condition).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..solution import Solution, Status
from .linearize import value_and_grad
from .loop import Rows, check_options, default_tol, dot, norm, relative, scale_of
from .objective import ROUNDING, first_stepsize, objective_on_rows

__all__ = ["lbfgs"]

_C1, _C2 = 1e-4, 0.9


@torch.no_grad()
def lbfgs(
    fun: Callable[[Any], Tensor],
    x0: Any,
    *,
    batch_ndim: int = 0,
    tol: float | None = None,
    max_iter: int = 1000,
    memory: int = 10,
) -> Solution:
    """L-BFGS with a Wolfe line search.

    Args:
        fun: f, maps x to one value per problem, ``(*batch,)``.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        tol: for ‖∇f‖ / L / ‖x‖; None for 1e-12 in float64 and 1e-6 in float32. A row that cannot improve any more counts as solved
            from 100 eps.
        max_iter: evaluations of f and its gradient.
        memory: pairs kept.

    Returns:
        :class:`~difflayers.Solution`. NUMERICAL_ERROR: f is not finite at the start, or no step along d decreases it.

    Example:
        >>> lbfgs(lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2, torch.tensor([-1.2, 1.0])).x
        tensor([1.0000, 1.0000])
    """
    check_options(tol, max_iter)
    if memory < 1:
        raise ValueError(f"memory must be at least 1, got {memory}")
    raveler, objective, x = objective_on_rows(fun, x0, batch_ndim)
    tol, eps = default_tol(x.dtype) if tol is None else tol, torch.finfo(x.dtype).eps
    start = x
    f, gradient = value_and_grad(objective, x)
    stepsize = first_stepsize(objective, x, gradient, None)
    history = _History(x, memory)
    rows = Rows(x)
    rows.record(x, relative(stepsize * norm(gradient), scale_of(x, start)))
    rows.stop(~torch.isfinite(f) | ~torch.isfinite(gradient).all(-1), Status.NUMERICAL_ERROR)
    rows.stop(rows.residual <= tol, Status.SOLVED)
    direction = -stepsize[..., None] * gradient
    # The bracket of the step length t: too short at `low`, too long at `high`.
    low, high, t = torch.zeros_like(f), torch.full_like(f, torch.inf), torch.ones_like(f)
    for _ in range(max_iter):
        if not rows.any_running():
            break
        trial = torch.where(rows.running[..., None], x + t[..., None] * direction, x)
        f_trial, gradient_trial = value_and_grad(objective, trial)
        rows.count()
        slope, slope_trial = dot(gradient, direction), dot(gradient_trial, direction)
        finite = torch.isfinite(f_trial) & torch.isfinite(gradient_trial).all(-1)
        level = (f_trial - f).abs() <= ROUNDING * eps * f.abs()
        enough = (f_trial <= f + _C1 * t * slope) & ~level | level & (slope_trial <= (2 * _C1 - 1) * slope)
        long = ~finite | ~enough
        short = ~long & (slope_trial < _C2 * slope)
        accept = rows.running & ~long & ~short
        history.append(accept, trial - x, gradient_trial - gradient)
        x = torch.where(accept[..., None], trial, x)
        f = torch.where(accept, f_trial, f)
        gradient = torch.where(accept[..., None], gradient_trial, gradient)
        residual = relative(history.stepsize(stepsize) * norm(gradient), scale_of(x, start))
        rows.residual = torch.where(accept & ~level, torch.inf, rows.residual)
        rows.record(x, residual)
        rows.stop(accept & (residual <= tol), Status.SOLVED)
        high, low = torch.where(long, t, high), torch.where(short, t, low)
        t = torch.where(torch.isinf(high), 2 * t, (low + high) / 2)
        if bool(accept.any()):
            fresh = history.direction(gradient)
            downhill = torch.isfinite(fresh).all(-1) & (dot(fresh, gradient) < 0)
            fresh = torch.where(downhill[..., None], fresh, -stepsize[..., None] * gradient)
            direction = torch.where(accept[..., None], fresh, direction)
            t, low = torch.where(accept, 1, t), torch.where(accept, 0, low)
            high = torch.where(accept, torch.inf, high)
        stuck = (torch.isfinite(high) & (high - low <= 1e-3 * eps**0.5 * high)) | (t > 1e10) | (rows.idle >= 100)
        rows.settle(stuck, residual * scale_of(x, start) / scale_of(x, start).clamp_min(1))
        rows.stop(stuck, Status.NUMERICAL_ERROR)
    return rows.solution(raveler)


class _History:
    """The last pairs s = x⁺ − x, y = ∇f(x⁺) − ∇f(x) of each row, oldest first; an unused place has ρ = 0."""

    def __init__(self, x: Tensor, memory: int) -> None:
        self.s, self.y = x.new_zeros(memory, *x.shape), x.new_zeros(memory, *x.shape)
        self.rho = x.new_zeros(memory, *x.shape[:-1])

    def append(self, where: Tensor, s: Tensor, y: Tensor) -> None:
        """Add a pair to the rows of ``where``, if its curvature is positive beyond rounding."""
        curvature = dot(s, y)
        where = where & (curvature > torch.finfo(s.dtype).eps * norm(s) * norm(y))
        self.s = torch.where(where[..., None], torch.cat([self.s[1:], s[None]]), self.s)
        self.y = torch.where(where[..., None], torch.cat([self.y[1:], y[None]]), self.y)
        self.rho = torch.where(where, torch.cat([self.rho[1:], 1 / curvature[None]]), self.rho)

    def stepsize(self, otherwise: Tensor) -> Tensor:
        """1/L, for the largest curvature of the pairs."""
        curvature = 1 / (self.rho * dot(self.s, self.s))
        largest = torch.where(self.rho > 0, curvature, 0).amax(0)
        return torch.where(largest > 0, 1 / largest, otherwise)

    def direction(self, gradient: Tensor) -> Tensor:
        """−H ∇f by the two-loop recursion."""
        q = -gradient
        weights = []
        for s, y, rho in zip(self.s.flip(0), self.y.flip(0), self.rho.flip(0), strict=True):
            weights.append(rho * dot(s, q))
            q = q - weights[-1][..., None] * y
        newest = self.rho[-1] * dot(self.y[-1], self.y[-1])
        q = q / torch.where(newest > 0, newest, 1)[..., None]
        for s, y, rho, weight in zip(self.s, self.y, self.rho, reversed(weights), strict=True):
            q = q + (weight - rho * dot(y, q))[..., None] * s
        return q
