"""Newton's method for F(x) = 0, a batch at a time.

Each row takes the step J d = −F and shortens it until ‖F‖ falls. Up to ``dense_limit`` unknowns J is formed and factorized; above,
GMRES solves for d with Jacobian-vector products. A row has converged when every equation is met to ``tol`` relative to the size
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
from .linearize import block_jacobian, jvp
from .loop import Rows, check_options, default_tol, norm, relative, scale_of

__all__ = ["newton"]

_TRIALS = 20


@torch.no_grad()
def newton(
    residual_fn: Callable[[Any], Any],
    x0: Any,
    *,
    batch_ndim: int = 0,
    tol: float | None = None,
    max_iter: int = 50,
    dense_limit: int = 256,
) -> Solution:
    """Damped Newton's method, or Newton–GMRES.

    Args:
        residual_fn: F, maps x to a pytree of the same structure.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        tol: relative, see above; None for 1e-12 in float64 and 1e-6 in float32. A row that cannot improve any more counts as
            solved from 100 eps.
        max_iter: Newton steps.
        dense_limit: the largest number of unknowns for which the Jacobian is formed.

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
    x = start = raveler.ravel(x0)
    tol = default_tol(x.dtype) if tol is None else tol
    linearization = _Dense if x.shape[-1] <= dense_limit else _MatrixFree
    rows, value = Rows(x), function(x)
    rows.stop(~torch.isfinite(value).all(-1), Status.NUMERICAL_ERROR)
    for k in range(max_iter + 1):
        if k == max_iter or not rows.any_running():
            break
        local = linearization(function, x, value)
        if k == 0:
            rows.record(x, local.residual(x, value, start))
            rows.stop(rows.residual <= tol, Status.SOLVED)
        step = local.step
        x, value, moved = _line_search(function, x, value, step.x, rows.running)
        rows.count()
        # The Jacobian of the previous point gives the scale of the new residual: near a solution they agree.
        rows.record(x, local.residual(x, value, start))
        rows.stop(moved & (rows.residual <= tol), Status.SOLVED)
        rows.settle(~moved, local.noise(x, value, start))
        rows.stop(~moved & (step.status == Status.SINGULAR), Status.SINGULAR)
        rows.stop(~moved, Status.NUMERICAL_ERROR)
    return rows.solution(raveler)


class _Dense:
    """The Newton step by a factorization."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, value: Tensor) -> None:
        self.jacobian = block_jacobian(function, x)
        self.slope = norm(self.jacobian)
        self.step = lu_factor(self.jacobian).solve(-value)

    def residual(self, x: Tensor, value: Tensor, start: Tensor) -> Tensor:
        """The largest |F_i| relative to its terms; unknowns near zero count with a little of the norm of x."""
        terms = (self.jacobian.abs() @ x.abs()[..., None]).squeeze(-1)
        floor = torch.finfo(x.dtype).eps ** 0.5 * self.slope * scale_of(x, start)[..., None]
        return relative(value.abs(), terms + floor).amax(-1)

    def noise(self, x: Tensor, value: Tensor, start: Tensor) -> Tensor:
        """The same, relative to the norm of x or to 1."""
        return relative(value.abs(), self.slope * scale_of(x, start).clamp_min(1)[..., None]).amax(-1)


class _MatrixFree:
    """The Newton step by GMRES, to a fixed accuracy so that no row's work depends on another's."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, value: Tensor) -> None:
        self.step = gmres(lambda v: jvp(function, (x,), (v,))[1], -value, tol=1e-4)
        # ‖J d‖ / ‖d‖ is a lower bound of ‖J‖, so the stopping rule is at least as strict as with J itself.
        self.slope = relative(norm(value), norm(self.step.x))

    def residual(self, x: Tensor, value: Tensor, start: Tensor) -> Tensor:
        """‖F‖ relative to ‖J‖ ‖x‖."""
        return relative(norm(value), self.slope * scale_of(x, start))

    def noise(self, x: Tensor, value: Tensor, start: Tensor) -> Tensor:
        """The same, relative to the norm of x or to 1."""
        return relative(norm(value), self.slope * scale_of(x, start).clamp_min(1))


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
        length = torch.where(torch.isfinite(vertex), vertex, 0).clamp(0.1 * length, 0.5 * length)
    return x, value, moved
