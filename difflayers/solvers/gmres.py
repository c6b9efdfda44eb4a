"""GMRES: the x of the Krylov space that minimizes ‖b − A x‖, for general A, batched.

Arnoldi builds an orthonormal basis V of span{r, A r, A² r, …} with A V_j = V_{j+1} H_j; each column of H is rotated to
triangular form as it comes (Givens), which gives the residual norm for free. After ``restart`` columns the best x becomes
the start of a new cycle. A row that stagnates gets cycles twice as long, up to n, where GMRES cannot fail in exact arithmetic.

References: Saad and Schultz, SIAM J. Sci. Stat. Comput. 7, 1986; flexible preconditioning: Saad, SIAM J. Sci. Comput. 14, 1993.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..solution import Solution, Status
from .loop import norm
from .systems import MatVec, Systems, acceptable

__all__ = ["gmres"]


@torch.no_grad()
def gmres(
    matvec: MatVec,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    preconditioner: MatVec | None = None,
    truncation: int | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    restart: int | None = None,
) -> Solution:
    """Restarted, flexible GMRES for any square A, indefinite and nonsymmetric included.

    Args:
        matvec: ``(*batch, n) -> (*batch, n)``, the product with A, row by row.
        b: ``(*batch, n)``.
        x0: ``(*batch, n)``, the start; zero if None.
        preconditioner: an approximation of A⁻¹ applied from the right; it may be nonlinear and sees vectors of norm 1.
        truncation: has no meaning here and must be None; see ``restart``.
        tol: relative residual; None for 1e-12 in float64 and 1e-6 in float32. What rounding forbids is not asked for.
        max_iter: products with A for a row; None for 10 n + 50, at most 10 000.
        restart: length of the first cycles; None for min(n, 30). The basis takes ``restart + 1`` vectors a row.

    Returns:
        :class:`~difflayers.Solution` with ``residual`` ‖b − A x‖ / ‖b‖. SINGULAR: the whole Krylov space holds no solution.

    Raises:
        ShapeError: ``matvec`` or ``x0`` do not match ``b``.
        ValueError: ``restart`` below 1.

    >>> A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> gmres(lambda v: v @ A.mT, torch.tensor([2.0, 1.0])).x
    tensor([-1.,  2.])
    """
    if truncation is not None:
        raise ValueError("truncation belongs to cg and normal_cg; gmres has restart=")
    n = b.shape[-1]
    if restart is not None and restart < 1:
        raise ValueError(f"restart must be at least 1, got {restart}")
    rows = Systems(matvec, b, x0, tol, max_iter)
    length = torch.full_like(rows.iterations, min(n, 30 if restart is None else restart))
    r = rows.r
    while rows.any_running():
        columns = torch.minimum(length, rows.limit - rows.iterations) * rows.running
        if not bool((columns > 0).any()):
            break
        before = rows.residual
        x = rows.x + _cycle(rows, r, columns, preconditioner)
        residual = rows.b - rows.product(x)
        size = norm(residual)
        better = rows.record(x, size)
        r = torch.where(better[..., None], residual, r)
        rows.stop(rows.residual <= rows.target, Status.SOLVED)
        # A cycle minimizes the residual. Where it hardly fell, rounding has the last word, or the space is too small, or, if it
        # was the whole space, the system has no solution.
        slow = rows.running & ~(rows.residual < 0.5 * before)
        rows.stop(slow & acceptable(rows.residual, rows.target, rows.norm_a, norm(rows.x), rows.norm_b), Status.SOLVED)
        rows.stop(slow & ~torch.isfinite(size), Status.NUMERICAL_ERROR)
        rows.stop(slow & (columns >= n), Status.SINGULAR)
        length = torch.where(slow, (2 * length).clamp_max(n), length)
    return rows.solution()


def _cycle(rows: Systems, r: Tensor, columns: Tensor, preconditioner: MatVec | None) -> Tensor:
    """One cycle from residuals ``r``, where each row builds at most its own number of ``columns``; returns the correction of x."""
    batch, most = r.shape[:-1], int(columns.max())
    beta = norm(r)
    basis = r.new_zeros(*batch, most + 1, r.shape[-1])
    basis[..., 0, :] = r / torch.where(beta == 0, 1, beta)[..., None]
    pre = basis if preconditioner is None else torch.zeros_like(basis)
    triangle = torch.eye(most, dtype=r.dtype, device=r.device).expand(*batch, most, most).clone()
    # All rotations so far as one matrix, so that a new column costs one product whatever its number.
    rotation = torch.eye(most + 1, dtype=r.dtype, device=r.device).expand(*batch, most + 1, most + 1).clone()
    rhs = r.new_zeros(*batch, most + 1)
    rhs[..., 0] = beta
    active = rows.running & (columns > 0)
    for j in range(most):
        direction = basis[..., j, :]
        if preconditioner is not None:
            direction = pre[..., j, :] = preconditioner(direction)
        w, _, w_norm = rows.stretch(direction)
        known = basis[..., : j + 1, :]
        h = (known @ w[..., None]).squeeze(-1)
        w = w - (h[..., None, :] @ known).squeeze(-2)
        again = (known @ w[..., None]).squeeze(-1)
        w = w - (again[..., None, :] @ known).squeeze(-2)
        below = norm(w)
        # Below rounding the space is invariant: the solution is in it, or nowhere.
        happy = below <= 10 * rows.eps * w_norm
        below = torch.where(happy, 0, below)
        column = (rotation[..., : j + 1, : j + 1] @ (h + again)[..., None]).squeeze(-1)
        radius = torch.hypot(column[..., j], below)
        sound = active & torch.isfinite(radius) & (radius > 10 * rows.eps * rows.norm_a)
        c = torch.where(sound, column[..., j] / radius, 1)
        s = torch.where(sound, below / radius, 0)
        column[..., j] = radius
        triangle[..., : j + 1, j] = torch.where(sound[..., None], column, triangle[..., : j + 1, j])
        upper, lower = rotation[..., j, :].clone(), rotation[..., j + 1, :].clone()
        rotation[..., j, :] = c[..., None] * upper + s[..., None] * lower
        rotation[..., j + 1, :] = c[..., None] * lower - s[..., None] * upper
        rhs[..., j + 1] = torch.where(sound, -s * rhs[..., j], 0)
        rhs[..., j] = torch.where(sound, c * rhs[..., j], 0)
        basis[..., j + 1, :] = torch.where((sound & ~happy)[..., None], w / torch.where(happy, 1, below)[..., None], 0)
        rows.count(active)
        active = sound & ~happy & (columns > j + 1) & (rhs[..., j + 1].abs() > rows.target)
        if not bool(active.any()):
            rhs[..., j + 1] = 0  # what the rotations left there is the residual, no weight of a column
            break
    weights = torch.linalg.solve_triangular(triangle, rhs[..., :most, None], upper=True)
    return (weights.mT @ pre[..., :most, :]).squeeze(-2)
