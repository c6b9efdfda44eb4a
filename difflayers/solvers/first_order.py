"""First-order methods for min f(x) + g(x), a batch at a time: f smooth, g known by its proximal operator.

One step of the **proximal gradient method** is x⁺ = prox_{s g}(y − s ∇f(y)); g = 0 gives gradient descent, the indicator of a set the
projected gradient method. With ``acceleration`` y runs ahead of x by Nesterov's momentum (FISTA), which starts anew whenever it points
uphill. **Mirror descent** measures distances by Kullback–Leibler instead: x⁺ ∝ x · exp(−s ∇f(x)) stays on the simplex without a projection.

The stepsize s of each row starts at 1/L, L estimated from the curvature along the first gradient. It is halved until
⟨∇f(y⁺) − ∇f(y), y⁺ − y⟩ ≤ ‖y⁺ − y‖² / s, and grows where that holds with much to spare: gradients still show the curvature where
values of f differ by rounding only. One gradient is evaluated per iteration. A row has converged when a step moves x by no more
than ``tol`` relative to its norm.

References: Beck and Teboulle, SIAM J. Imaging Sci. 2, 2009 (FISTA); O'Donoghue and Candès, Found. Comput. Math. 15, 2015,
arXiv:1204.3982 (restart); Beck and Teboulle, Oper. Res. Lett. 31, 2003 (mirror descent).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pytree import Raveler
from ..solution import Solution, Status
from .linearize import value_and_grad
from .loop import Rows, check_options, default_tol, dot, norm, relative, scale_of
from .objective import first_stepsize, objective_on_rows

__all__ = ["gradient_descent", "mirror_descent", "projected_gradient", "proximal_gradient"]


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
    return _descend(fun, x0, _gradient_step, batch_ndim, stepsize, acceleration, tol, max_iter)


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

    def step(raveler: Raveler, y: Tensor, gradient: Tensor, s: Tensor) -> Tensor:
        ahead = raveler.unravel(_gradient_step(raveler, y, gradient, s))
        return raveler.ravel(prox(ahead, _like(raveler, s, ahead)))

    return _descend(fun, x0, step, batch_ndim, stepsize, acceleration, tol, max_iter)


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

    def step(raveler: Raveler, y: Tensor, gradient: Tensor, s: Tensor) -> Tensor:
        return raveler.ravel(projection(raveler.unravel(_gradient_step(raveler, y, gradient, s))))

    return _descend(fun, x0, step, batch_ndim, stepsize, acceleration, tol, max_iter)


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

    def step(raveler: Raveler, y: Tensor, gradient: Tensor, s: Tensor) -> Tensor:
        exponent = -s[..., None] * gradient
        if projection is not None:
            return raveler.ravel(projection(raveler.unravel(y * torch.exp(exponent))))
        # The largest factor is 1, so nothing overflows; the sum divides it out.
        rows = y * torch.exp(exponent - exponent.amax(-1, keepdim=True))
        return rows / rows.sum(-1, keepdim=True)

    def divergence(new: Tensor, old: Tensor) -> Tensor:
        # KL(new, old) + KL(old, new), without cancellation
        change = new - old
        return (change * torch.log1p(torch.where(old > 0, change / old, 0))).sum(-1)

    return _descend(fun, x0, step, batch_ndim, stepsize, False, tol, max_iter, divergence)


def _gradient_step(raveler: Raveler, y: Tensor, gradient: Tensor, s: Tensor) -> Tensor:
    return y - s[..., None] * gradient


def _square(new: Tensor, old: Tensor) -> Tensor:
    return dot(new - old, new - old)


def _descend(
    fun: Callable[[Any], Tensor],
    x0: Any,
    step: Callable[[Raveler, Tensor, Tensor, Tensor], Tensor],
    batch_ndim: int,
    stepsize: float | None,
    acceleration: bool,
    tol: float | None,
    max_iter: int,
    divergence: Callable[[Tensor, Tensor], Tensor] = _square,
) -> Solution:
    """Iterate x⁺ = step(y, ∇f(y), s); ``divergence``, symmetric, is the squared distance that ⟨∇f(y⁺) − ∇f(y), y⁺ − y⟩ is bounded by."""
    check_options(tol, max_iter)
    raveler, objective, x = objective_on_rows(fun, x0, batch_ndim)
    tol = default_tol(x.dtype) if tol is None else tol
    start = y = x
    _, gradient = value_and_grad(objective, y)
    s = first = first_stepsize(objective, x, gradient, stepsize)
    rows, momentum = Rows(x), torch.ones_like(s)
    # Shorter steps than this are lost in the rounding of x.
    shortest = 1e-2 * torch.finfo(x.dtype).eps ** 0.5 * first
    # Without momentum steps up to 2/L contract.
    slack = 1.0 if acceleration else 1.5
    quiet, patience = torch.zeros_like(rows.iterations), torch.ones_like(rows.iterations)
    for k in range(max_iter):
        trial = step(raveler, y, gradient, s)
        move = trial - y
        # A step that was shortened again and again is small for the wrong reason.
        shortened = (first / s).clamp(1, 1e3)
        residual = relative(shortened * norm(move), torch.maximum(norm(trial), scale_of(y, start)))
        rows.count()
        # Where the momentum is new y is x itself, an outcome of the step, and this is its residual.
        genuine, done = momentum == 1, residual <= tol
        rows.residual = torch.where(rows.running & genuine & done, torch.inf, rows.residual)
        rows.record(torch.where(genuine[..., None], y, trial), residual)
        rows.stop(genuine & done, Status.SOLVED)
        rows.stop(~torch.isfinite(residual) | (s < shortest), Status.NUMERICAL_ERROR)
        if k % 10 == 9:
            rows.settle(rows.idle >= 50, shortened * norm(move) / scale_of(y, start).clamp_min(1))
        if not rows.any_running():
            break
        # Restart where the momentum points uphill, and to check a row that seems to have converged.
        uphill = (dot(move, trial - x) < 0) | done if acceleration else torch.ones_like(done)
        grown = torch.where(uphill, 1, (1 + torch.sqrt(1 + 4 * momentum**2)) / 2)
        ahead = trial + torch.where(uphill, 0, (momentum - 1) / grown)[..., None] * (trial - x)
        _, gradient_ahead = value_and_grad(objective, ahead)
        accept = rows.running
        if stepsize is None:
            bend, distance = dot(gradient_ahead - gradient, ahead - y), divergence(ahead, y)
            longest = slack * distance / bend
            accept = accept & (s * bend <= slack * distance)
            # Each stepsize that proved too long doubles the wait before a longer one is tried.
            quiet, patience = torch.where(accept, quiet + 1, 0), torch.where(accept, patience, 2 * patience)
            longer = (s * bend < 0.1 * distance) & (quiet > patience)
            shorter = torch.where(torch.isfinite(longest), longest, 0).clamp(0.1 * s, 0.9 * s)
            s = torch.where(accept, torch.where(longer, 2 * s, s), shorter)
        x = torch.where(accept[..., None], trial, x)
        y = torch.where(accept[..., None], ahead, y)
        gradient = torch.where(accept[..., None], gradient_ahead, gradient)
        momentum = torch.where(accept, grown, momentum)
    if rows.any_running():
        # With momentum the residuals on the way belong to other points.
        move = step(raveler, rows.x, value_and_grad(objective, rows.x)[1], s) - rows.x
        rows.residual = torch.where(rows.running, relative(norm(move), scale_of(rows.x, start)), rows.residual)
    return rows.solution(raveler)


def _like(raveler: Raveler, s: Tensor, x: Any) -> Any:
    """The stepsizes ``(*batch,)`` in a form that broadcasts against x."""
    if raveler.batch_ndim == 0:
        return s
    if isinstance(x, Tensor):
        return s.reshape(*s.shape, *[1] * (x.dim() - s.dim()))
    return raveler.unravel(s[..., None].expand(*s.shape, sum(raveler.sizes)))
