"""Newton's method for F(x) = 0, a batch at a time.

Each row takes the step J d = −F and shortens it until ‖F‖ falls. Up to ``dense_limit`` unknowns J is formed and factorized; above,
GMRES solves for d with Jacobian-vector products, or, if F is the gradient of a convex function and J therefore symmetric, the method of
conjugate gradients does. A row has converged when every equation is met to ``tol`` relative to the size
of its terms, |F_i| ≤ tol · Σ_j |J_ij| |x_j|, so neither the units of the equations nor those of the unknowns matter.

References: Dennis and Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear Equations, 1983; Oettli and Prager,
Numer. Math. 6, 1964 (the stopping rule); Knoll and Keyes, Jacobian-free Newton–Krylov methods, J. Comput. Phys. 193, 2004.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pytree import Raveler
from ..solution import Solution, Status
from .dense import lu_factor
from .gmres import gmres
from .krylov import cg
from .linearize import block_jacobian, jvp, vjp
from .loop import Rows, check_options, default_tol, norm, relative

__all__ = ["newton"]

_TRIALS = 25


@torch.no_grad()
def newton(
    residual_fn: Callable[[Any], Any],
    x0: Any,
    *,
    batch_ndim: int = 0,
    tol: float | None = None,
    max_iter: int = 50,
    dense_limit: int = 256,
    symmetric: bool = False,
) -> Solution:
    """Damped Newton's method, Newton–GMRES, or Newton–CG.

    Args:
        residual_fn: F, maps x to a pytree of the same structure.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        tol: relative, see above; None for 1e-12 in float64 and 1e-6 in float32. A row that cannot improve any more counts as
            solved from 100 eps.
        max_iter: Newton steps.
        dense_limit: the largest number of unknowns for which the Jacobian is formed.
        symmetric: the Jacobian is symmetric positive definite; above ``dense_limit`` conjugate gradients take the place of GMRES.

    Returns:
        :class:`~difflayers.Solution`. SINGULAR: the Jacobian has no inverse at some iterate. NUMERICAL_ERROR: F is not finite
        at the start, or no step along d makes ‖F‖ smaller (a local minimum of ‖F‖).

    Example:
        >>> newton(lambda x: x**2 - torch.tensor([4.0, 9.0]), torch.ones(2)).x
        tensor([2., 3.])
    """
    check_options(tol, max_iter)
    raveler = Raveler(x0, batch_ndim)
    function = raveler.on_rows(residual_fn)
    x = raveler.ravel(x0)
    tol = default_tol(x.dtype) if tol is None else tol
    linearization = _Dense if x.shape[-1] <= dense_limit else _Symmetric if symmetric else _MatrixFree
    rows, value = Rows(x), function(x)
    rows.stop(~torch.isfinite(value).all(-1), Status.NUMERICAL_ERROR)
    # The largest that each unknown has been: one that is zero at the solution still has a scale.
    extent = x.abs()
    for k in range(max_iter + 1):
        if k == max_iter or not rows.any_running():
            break
        local = linearization(function, x, value)
        if k == 0:
            rows.record(x, local.residual(x, value, extent))
            rows.stop(rows.residual <= tol, Status.SOLVED)
        x, value, moved = _line_search(function, x, value, local.step.x, rows.running)
        extent = torch.maximum(extent, x.abs())
        rows.count()
        # ‖F‖ falls with every step, so the last iterate is the best. The Jacobian of the point before gives the scale of its
        # residual: near a solution they agree.
        rows.residual = torch.where(rows.running & moved, torch.inf, rows.residual)
        rows.record(x, local.residual(x, value, extent))
        rows.stop(moved & (rows.residual <= tol), Status.SOLVED)
        rows.settle(~moved, local.residual(x, value, extent, floor=1.0))
        rows.stop(~moved & (local.step.status == Status.SINGULAR), Status.SINGULAR)
        rows.stop(~moved, Status.NUMERICAL_ERROR)
    return rows.solution(raveler)


class _Dense:
    """The Newton step by a factorization."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, value: Tensor) -> None:
        jacobian = block_jacobian(function, x)
        self.magnitude = jacobian.abs()
        self.step = lu_factor(jacobian).solve(-value)

    def residual(self, x: Tensor, value: Tensor, extent: Tensor, floor: float = 0.0) -> Tensor:
        """The largest ``|F_i|`` relative to its terms, where unknowns near zero, or below ``floor``, count for a little more."""
        terms = self.magnitude @ _size_of(x, extent, floor)[..., None]
        return relative(value.abs(), terms.squeeze(-1)).amax(-1)


class _MatrixFree:
    """The Newton step by GMRES, to a fixed accuracy so that no row's work depends on another's."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, value: Tensor) -> None:
        # A lower bound of ‖J‖ from all the products that GMRES makes: the stopping rule is at least as strict as with ‖J‖.
        self.slope = torch.zeros_like(x[..., 0])
        product = self.linearize(function, x)

        def noted(v: Tensor) -> Tensor:
            image = product(v)
            self.slope = torch.fmax(self.slope, norm(image) / norm(v))
            return image

        self.step = self.solve(noted, -value, tol=1e-4)

    solve: Callable[..., Solution] = staticmethod(gmres)

    @staticmethod
    def linearize(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: jvp(function, (x,), (v,))[1]

    def residual(self, x: Tensor, value: Tensor, extent: Tensor, floor: float = 0.0) -> Tensor:
        """‖F‖ relative to ‖J‖ ‖x‖, likewise."""
        return relative(norm(value), self.slope * norm(_size_of(x, extent, floor)))


class _Symmetric(_MatrixFree):
    """The Newton step by conjugate gradients; a product with Jᵀ = J needs no second pass through F."""

    solve: Callable[..., Solution] = staticmethod(cg)

    @staticmethod
    def linearize(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
        _, pullback = vjp(function, x)
        return lambda v: pullback(v)[0]


def _size_of(x: Tensor, extent: Tensor, floor: float) -> Tensor:
    return torch.maximum(x.abs(), torch.finfo(x.dtype).eps ** 0.5 * extent).clamp_min(floor)


def _line_search(
    function: Callable[[Tensor], Tensor], x: Tensor, value: Tensor, step: Tensor, running: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Shorten the step of each row until ‖F‖ falls; returns the new x and F, and the rows that moved."""
    before = norm(value) ** 2
    length = torch.ones_like(before)
    searching = running & torch.isfinite(step).all(-1)
    moved = torch.zeros_like(running)
    for _ in range(_TRIALS):
        if not bool(searching.any()):
            break
        trial = torch.where(searching[..., None], x + length[..., None] * step, x)
        trial_value = function(trial)
        after = norm(trial_value) ** 2
        accept = searching & (after <= (1 - 1e-4 * length) * before)
        x = torch.where(accept[..., None], trial, x)
        value = torch.where(accept[..., None], trial_value, value)
        moved, searching = moved | accept, searching & ~accept
        # ‖F‖² along d starts with slope −2 ‖F‖²: the minimum of the parabola through what is known, within reason.
        vertex = length**2 * before / (after - before + 2 * length * before)
        length = torch.where(torch.isfinite(vertex), vertex, 0).clamp(0.25 * length, 0.5 * length)
    return x, value, moved
