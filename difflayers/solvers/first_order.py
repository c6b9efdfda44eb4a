"""First-order methods for min f(x) + g(x), a batch at a time: f smooth, g known by its proximal operator.

One step of the **proximal gradient method** is x⁺ = prox_{s g}(y − s ∇f(y)); g = 0 gives gradient descent, the indicator of a set the
projected gradient method. With ``acceleration`` y runs ahead of x by Nesterov's momentum (FISTA), which starts anew whenever it points
uphill. **Mirror descent** measures distances by Kullback–Leibler instead: x⁺ ∝ x · exp(−s ∇f(x)) stays on the simplex without a projection.

The stepsize of each row starts at 1/L, L estimated from the curvature along the first gradient, and is halved until the quadratic
model with curvature 1/s lies above f at x⁺ (up to rounding). One trial point is evaluated per iteration. A row has converged when
a step moves x by no more than ``tol`` relative to its norm.

References: Beck and Teboulle, SIAM J. Imaging Sci. 2, 2009 (FISTA); O'Donoghue and Candès, Found. Comput. Math. 15, 2015,
arXiv:1204.3982 (restart); Beck and Teboulle, Oper. Res. Lett. 31, 2003 (mirror descent).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..pytree import Raveler
from ..solution import Solution, Status
from .linearize import value_and_grad
from .loop import Rows, check_options, default_tol, dot, norm, relative, scale_of

__all__ = ["gradient_descent", "projected_gradient", "proximal_gradient"]

# f differs from its model by rounding long before x has converged: differences below this multiple of eps |f| say nothing.
_NOISE = 10.0


@torch.no_grad()
def gradient_descent(
    fun: Callable[[Any], Tensor],
    x0: Any,
    *,
    batch_ndim: int = 0,
    stepsize: float | None = None,
    acceleration: bool = False,
    tol: float | None = None,
    max_iter: int = 10_000,
) -> Solution:
    """Gradient descent x⁺ = x − s ∇f(x).

    Args:
        fun: f, maps x to one value per problem, ``(*batch,)``.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        stepsize: s; None for a line search.
        acceleration: Nesterov's momentum with restart.
        tol: for ‖x⁺ − x‖ / ‖x‖; None for 1e-12 in float64 and 1e-6 in float32.
        max_iter: trial points.

    Returns:
        :class:`~difflayers.Solution`.

    Example:
        >>> gradient_descent(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2)).x
        tensor([3., 3.])
    """
    return _descend(fun, None, x0, batch_ndim, stepsize, acceleration, tol, max_iter)


@torch.no_grad()
def proximal_gradient(
    fun: Callable[[Any], Tensor],
    prox: Callable[[Any, Any], Any],
    x0: Any,
    *,
    batch_ndim: int = 0,
    stepsize: float | None = None,
    acceleration: bool = True,
    tol: float | None = None,
    max_iter: int = 10_000,
) -> Solution:
    """Proximal gradient method, accelerated by default (FISTA).

    Args:
        fun: f, maps x to one value per problem, ``(*batch,)``.
        prox: ``(x, stepsize) -> x``, the proximal operator of stepsize · g. The stepsize is a tensor that broadcasts against x: a
            scalar if ``batch_ndim=0``, else of shape ``(*batch, 1, ...)``; for a batched pytree it is a pytree like x.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        stepsize: s; None for a line search.
        acceleration: Nesterov's momentum with restart.
        tol: for ‖x⁺ − x‖ / ‖x‖; None for 1e-12 in float64 and 1e-6 in float32.
        max_iter: trial points.

    Returns:
        :class:`~difflayers.Solution`.

    Example:
        >>> soft = lambda x, s: x.sign() * (x.abs() - s).clamp(min=0)
        >>> proximal_gradient(lambda x: ((x - torch.tensor([3.0, 0.5])) ** 2).sum() / 2, soft, torch.zeros(2)).x
        tensor([2., 0.])
    """
    return _descend(fun, prox, x0, batch_ndim, stepsize, acceleration, tol, max_iter)


@torch.no_grad()
def projected_gradient(
    fun: Callable[[Any], Tensor],
    projection: Callable[[Any], Any],
    x0: Any,
    *,
    batch_ndim: int = 0,
    stepsize: float | None = None,
    acceleration: bool = True,
    tol: float | None = None,
    max_iter: int = 10_000,
) -> Solution:
    """Projected gradient method, accelerated by default.

    Args:
        fun: f, maps x to one value per problem, ``(*batch,)``.
        projection: ``x -> x``, the nearest point of a convex set.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        stepsize: s; None for a line search.
        acceleration: Nesterov's momentum with restart.
        tol: for ‖x⁺ − x‖ / ‖x‖; None for 1e-12 in float64 and 1e-6 in float32.
        max_iter: trial points.

    Returns:
        :class:`~difflayers.Solution`.

    Example:
        >>> target = torch.tensor([3.0, -1.0])
        >>> projected_gradient(lambda x: ((x - target) ** 2).sum(), lambda x: x.clamp(0, 2), torch.ones(2)).x
        tensor([2., 0.])
    """
    return _descend(fun, lambda x, stepsize: projection(x), x0, batch_ndim, stepsize, acceleration, tol, max_iter)


@torch.no_grad()
def mirror_descent(
    fun: Callable[[Any], Tensor],
    x0: Any,
    *,
    batch_ndim: int = 0,
    projection: Callable[[Any], Any] | None = None,
    stepsize: float | None = None,
    tol: float | None = None,
    max_iter: int = 10_000,
) -> Solution:
    """Mirror descent with the entropy as mirror map, for nonnegative unknowns.

    Args:
        fun: f, maps x to one value per problem, ``(*batch,)``.
        x0: the starting point, a pytree of positive tensors ``(*batch, ...)``. An entry that is zero stays zero.
        batch_ndim: how many leading dimensions index independent problems.
        projection: ``x -> x``, the point of the set that is nearest to positive x in the Kullback–Leibler divergence; None for the
            simplex of all unknowns of a problem, where it divides by the sum.
        stepsize: s; None for a line search.
        tol: for ‖x⁺ − x‖ / ‖x‖; None for 1e-12 in float64 and 1e-6 in float32.
        max_iter: trial points.

    Returns:
        :class:`~difflayers.Solution`.

    Example:
        >>> target = torch.tensor([0.6, 0.3, 0.1])
        >>> mirror_descent(lambda x: ((x - target) ** 2).sum(), torch.ones(3) / 3).x
        tensor([0.6000, 0.3000, 0.1000])
    """
    raveler = Raveler(x0, batch_ndim)

    def project(rows: Tensor) -> Tensor:
        if projection is None:
            return rows / rows.sum(-1, keepdim=True)
        return raveler.ravel(projection(raveler.unravel(rows)))

    def step(y: Tensor, gradient: Tensor, s: Tensor) -> Tensor:
        exponent = -s[..., None] * gradient
        # The largest factor is 1: nothing overflows, and on the simplex the sum divides it out.
        shift = exponent.amax(-1, keepdim=True) if projection is None else 0
        return project(y * torch.exp(exponent - shift))

    def divergence(new: Tensor, old: Tensor) -> Tensor:
        return (torch.xlogy(new, new / torch.where(old > 0, old, 1)) - new + old).sum(-1)

    return _descend(fun, x0, batch_ndim, stepsize, False, tol, max_iter, step, divergence)


def _descend(
    fun: Callable[[Any], Tensor],
    prox: Callable[[Any, Any], Any] | None,
    x0: Any,
    batch_ndim: int,
    stepsize: float | None,
    acceleration: bool,
    tol: float | None,
    max_iter: int,
) -> Solution:
    check_options(tol, max_iter)
    raveler, objective, x = _problem(fun, x0, batch_ndim)
    tol, eps = default_tol(x.dtype) if tol is None else tol, torch.finfo(x.dtype).eps

    def step(y: Tensor, gradient: Tensor, s: Tensor) -> Tensor:
        trial = y - s[..., None] * gradient
        return trial if prox is None else raveler.ravel(prox(raveler.unravel(trial), _like(raveler, s, x0)))

    start = y = x
    f, gradient = value_and_grad(objective, y)
    s = first = _first_stepsize(objective, x, gradient, stepsize)
    rows, momentum = Rows(x), torch.ones_like(f)
    for _ in range(max_iter):
        trial = step(y, gradient, s)
        move = trial - y
        length = norm(move)
        residual = relative(length, torch.maximum(norm(trial), scale_of(y, start)))
        rows.count()
        # Where the momentum is new y is x itself, which satisfies g's constraint, and this is its residual.
        genuine, done = momentum == 1, residual <= tol
        rows.residual = torch.where(genuine & done, torch.inf, rows.residual)
        rows.record(torch.where(genuine[..., None], y, trial), residual)
        rows.stop(genuine & done, Status.SOLVED)
        rows.stop(~torch.isfinite(length) | (s < 1e-10 * first), Status.NUMERICAL_ERROR)
        if not rows.any_running():
            break
        if acceleration:
            f_trial = objective(trial)
            # Restart where the momentum points uphill, and to check a row that seems to have converged.
            uphill = (dot(move, trial - x) < 0) | done
            grown = torch.where(uphill, 1, (1 + torch.sqrt(1 + 4 * momentum**2)) / 2)
            ahead = trial + torch.where(uphill, 0, (momentum - 1) / grown)[..., None] * (trial - x)
            f_ahead, gradient_ahead = value_and_grad(objective, ahead)
        else:
            grown, ahead = momentum, trial
            f_ahead, gradient_ahead = value_and_grad(objective, ahead)
            f_trial = f_ahead
        accept = rows.running
        if stepsize is None:
            rise = f_trial - f - dot(gradient, move)
            noise = _NOISE * eps * f.abs()
            accept = accept & (rise <= length**2 / (2 * s) + noise)
            s = torch.where(accept, torch.where(GROW & (rise > noise) & (rise < 0.1 * length**2 / (2 * s)), 1.5 * s, s), s / 2)
        x = torch.where(accept[..., None], trial, x)
        y = torch.where(accept[..., None], ahead, y)
        gradient = torch.where(accept[..., None], gradient_ahead, gradient)
        f = torch.where(accept, f_ahead, f)
        momentum = torch.where(accept, grown, momentum)
    return rows.solution(raveler)

GROW=torch.tensor(True)
def _problem(fun: Callable[[Any], Tensor], x0: Any, batch_ndim: int) -> tuple[Raveler, Callable[[Tensor], Tensor], Tensor]:
    """The unknowns as rows and the objective on them, checked to give one value per row."""
    raveler = Raveler(x0, batch_ndim)
    x = raveler.ravel(x0)
    batch = x.shape[:-1]

    def objective(matrix: Tensor) -> Tensor:
        value = fun(raveler.unravel(matrix))
        if not isinstance(value, Tensor) or value.shape != batch:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"the objective must return one value per problem, shape {tuple(batch)} with batch_ndim={batch_ndim}, got {came}")
        return value

    return raveler, objective, x


def _first_stepsize(objective: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, stepsize: float | None) -> Tensor:
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


def _like(raveler: Raveler, s: Tensor, x: Any) -> Any:
    """The stepsizes ``(*batch,)`` in a form that broadcasts against x."""
    if raveler.batch_ndim == 0:
        return s
    if isinstance(x, Tensor):
        return s.reshape(*s.shape, *[1] * (x.dim() - s.dim()))
    return raveler.unravel(s[..., None].expand(*s.shape, sum(raveler.sizes)))
