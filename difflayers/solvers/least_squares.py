"""Nonlinear least squares min ½‖r(x)‖², a batch at a time, for any number of residuals.

Both methods solve (JᵀJ + μ D) d = −Jᵀr, where D holds the squared norms of the columns of J, the largest so far, so that the
units of the unknowns don't matter. **Levenberg–Marquardt** steers μ by the ratio of the achieved to the predicted decrease
(Nielsen's rule): towards Gauss–Newton where the model is good, towards short gradient steps where it is not. **Gauss–Newton** keeps
μ at rounding level, just enough for a rank-deficient J, and shortens the step until the sum of squares falls. One trial point is
evaluated per iteration.

A row has converged when every component of the gradient is small beside the numbers that it is a difference of:
|(Jᵀr)_j| ≤ tol · ‖J_j‖ · (‖r‖ + Σ_k ‖J_k‖ |x_k|), J_j being the columns of J.

References: Marquardt, SIAM J. Appl. Math. 11, 1963; Nielsen, Damping parameter in Marquardt's method, IMM-REP-1999-05, DTU, 1999;
Moré, The Levenberg–Marquardt algorithm: implementation and theory, 1978.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pytree import Raveler
from ..solution import Solution, Status
from .linearize import block_jacobian
from .loop import Rows, check_options, default_tol, dot, norm, relative

__all__ = ["NormalEquations", "gauss_newton", "levenberg_marquardt"]

NormalEquations = Callable[[Any], tuple[Tensor, Tensor]]


@torch.no_grad()
def levenberg_marquardt(
    residual_fn: Callable[[Any], Any],
    x0: Any,
    *,
    batch_ndim: int = 0,
    tol: float | None = None,
    max_iter: int = 200,
    damping: float = 1e-3,
    normal_equations: NormalEquations | None = None,
    hessian: Callable[[Any], Tensor] | None = None,
) -> Solution:
    """Levenberg–Marquardt with one damping per problem.

    Args:
        residual_fn: r, maps x to a pytree of tensors ``(*batch, ...)`` of any structure.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        tol: for the scaled gradient, see above; None for 1e-12 in float64 and 1e-6 in float32. A row that cannot improve any more
            counts as solved from 100 eps.
        max_iter: trial points.
        damping: the first μ.
        normal_equations: as in :func:`gauss_newton`.
        hessian: ``x -> ∇²(½‖r‖²)`` of shape ``(*batch, n, n)``. With it the problems on which Gauss–Newton's model is slow (large
            residuals) take Newton's from then on, wherever it is convex, and end in a few steps.

    Returns:
        :class:`~difflayers.Solution`. NUMERICAL_ERROR: r is not finite at the start, or no step decreases the sum of squares.

    Example:
        >>> t = torch.linspace(0, 1, 20)
        >>> data = 2.0 * torch.exp(-3.0 * t)
        >>> levenberg_marquardt(lambda p: p[0] * torch.exp(-p[1] * t) - data, torch.ones(2)).x
        tensor([2.0000, 3.0000])
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
    return _minimize(residual_fn, x0, batch_ndim, tol, max_iter, damping, normal_equations, hessian)


@torch.no_grad()
def gauss_newton(
    residual_fn: Callable[[Any], Any],
    x0: Any,
    *,
    batch_ndim: int = 0,
    tol: float | None = None,
    max_iter: int = 100,
    normal_equations: NormalEquations | None = None,
) -> Solution:
    """Gauss–Newton with step control, for small residuals and good starting points.

    Args:
        residual_fn: r, maps x to a pytree of tensors ``(*batch, ...)`` of any structure.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        tol: for the scaled gradient, see above; None for 1e-12 in float64 and 1e-6 in float32. A row that cannot improve any more
            counts as solved from 100 eps.
        max_iter: trial points.
        normal_equations: ``x -> (JᵀJ, Jᵀr)``, of shapes ``(*batch, n, n)`` and ``(*batch, n)``, for residuals whose structure gives them
            cheaper than forward mode does; None differentiates ``residual_fn``.

    Returns:
        :class:`~difflayers.Solution`. NUMERICAL_ERROR: r is not finite at the start, or no step decreases the sum of squares.

    Example:
        >>> gauss_newton(lambda x: torch.stack([x[0] - 1, 10 * (x[1] - x[0] ** 2)]), torch.zeros(2)).x
        tensor([1., 1.])
    """
    return _minimize(residual_fn, x0, batch_ndim, tol, max_iter, None, normal_equations, None)


def _minimize(
    residual_fn: Callable[[Any], Any],
    x0: Any,
    batch_ndim: int,
    tol: float | None,
    max_iter: int,
    damping: float | None,
    normal_equations: NormalEquations | None,
    hessian: Callable[[Any], Tensor] | None,
) -> Solution:
    check_options(tol, max_iter)
    raveler = Raveler(x0, batch_ndim)
    x = raveler.ravel(x0)
    # r has its own structure, known once it has been called.
    codomain = Raveler(residual_fn(x0), batch_ndim)

    def function(matrix: Tensor) -> Tensor:
        return codomain.ravel(residual_fn(raveler.unravel(matrix)))

    def linearize(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        if normal_equations is not None:
            return normal_equations(raveler.unravel(x))
        jacobian = block_jacobian(function, x)
        return jacobian.mT @ jacobian, (r[..., None, :] @ jacobian).squeeze(-2)

    tol, eps = default_tol(x.dtype) if tol is None else tol, torch.finfo(x.dtype).eps
    rows, r = Rows(x), function(x)
    rows.stop(~torch.isfinite(r).all(-1), Status.NUMERICAL_ERROR)
    # In Gauss–Newton μ stays and the step is shortened; in Levenberg–Marquardt the step is whole and μ grows.
    mu = torch.full_like(rows.residual, 10 * x.shape[-1] * eps if damping is None else damping)
    length, growth = torch.ones_like(mu), torch.full_like(mu, 2)
    least: Tensor | None = None
    weights, fresh = torch.zeros_like(x), True
    # Rows whose gradient has fallen by less than four from one point to the next are left to Newton's model.
    slow, accept, before = torch.zeros_like(rows.running), rows.running, torch.full_like(mu, torch.inf)
    for k in range(max_iter + 1):
        if fresh:
            gram, gradient = linearize(x, r)
            columns = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
            # The longest a column has been: one that fades must not let its unknown run away.
            weights = torch.maximum(weights, columns)
            extent = norm(r) + dot(columns, x.abs())
            least = eps**0.5 * extent if least is None else least
            residual = relative(gradient.abs(), columns * torch.maximum(extent, least)[..., None]).amax(-1)
            slow = slow | (accept & (residual > 0.25 * before))
            before = torch.where(accept, residual, before)
            model = gram
            if hessian is not None and bool((slow & rows.running & (residual > tol)).any()):
                newton = hessian(raveler.unravel(x))
                convex = torch.linalg.cholesky_ex(newton)[1] == 0
                model = torch.where((slow & convex)[..., None, None], newton, gram)
            rows.record(x, residual)
            rows.stop(residual <= tol, Status.SOLVED)
            rows.stop(~torch.isfinite(residual), Status.NUMERICAL_ERROR)
        if k == max_iter or not rows.any_running():
            break
        step = _damped_step(model, weights, gradient, mu)
        trial = torch.where(rows.running[..., None], x + length[..., None] * step, x)
        trial_r = function(trial)
        rows.count()
        curvature = dot(step, (model @ step[..., None]).squeeze(-1))
        predicted = -length * dot(gradient, step) - length**2 * curvature / 2
        ratio = dot(r - trial_r, r + trial_r) / 2 / predicted
        # Near a minimum with a nonzero sum of squares the decrease drowns in its rounding long before the gradient is small.
        # Then μ, proven up to here, is kept, and the steps are taken on trust.
        blind = (step != 0).any(-1) & (predicted.abs() <= 50 * eps * dot(r, r))
        accept = rows.running & torch.isfinite(trial_r).all(-1) & (blind | (ratio > 1e-4))
        if damping is None:
            length = torch.where(accept, 1, length / 4)
            hopeless = length < 1e-10
        else:
            shrink = (1 - (2 * ratio.clamp(max=1e3) - 1) ** 3).clamp(min=1 / 3)
            mu = torch.where(accept, torch.where(blind, mu, mu * shrink), mu * growth).clamp(min=eps)
            growth = torch.where(accept, 2, 2 * growth)
            hopeless = mu > 1 / eps
        x = torch.where(accept[..., None], trial, x)
        r = torch.where(accept[..., None], trial_r, r)
        # A smaller sum of squares is the better iterate even if its gradient is not.
        rows.residual = torch.where(accept & ~blind, torch.inf, rows.residual)
        hopeless = hopeless | (rows.idle >= 20)
        rows.settle(hopeless, relative(gradient.abs(), columns * extent.clamp_min(1)[..., None]).amax(-1))
        rows.stop(hopeless, Status.NUMERICAL_ERROR)
        fresh = bool(accept.any())
    return rows.solution(raveler)


def _damped_step(model: Tensor, weights: Tensor, gradient: Tensor, mu: Tensor) -> Tensor:
    """d of (M + μ D) d = −Jᵀr in the scaled unknowns √D d, M being the model's; an unknown on which r doesn't depend stays where it is."""
    scale = torch.where(weights > 0, weights, 1)
    normal = model / scale[..., None, :] / scale[..., None] + torch.diag_embed(torch.where(weights > 0, mu[..., None], 1))
    factor, info = torch.linalg.cholesky_ex(normal)
    step = -torch.cholesky_solve((gradient / scale)[..., None], factor).squeeze(-1) / scale
    # Too little damping for a positive definite matrix: a zero step is not accepted, and μ grows.
    return torch.where((info == 0)[..., None], step, 0)
