"""Krylov methods with short recurrences for batches of systems A x = b, each row its own system.

* :func:`cg` builds directions p_k that are A-orthogonal, from the residual or from a preconditioned residual z_k = M(r_k):
  p_k = z_k − Σ_i (z_kᵀA p_i / p_iᵀA p_i) p_i over the last ``truncation`` directions. With one direction and a fixed symmetric M
  this is the conjugate gradient method; M may also be nonlinear, a learned network say, and then more directions repair what
  the recurrence loses (flexible conjugate gradients; Notay, SIAM J. Sci. Comput. 22, 2000; deep conjugate directions:
  Kaneda et al., ICML 2023, arXiv:2205.10763).
* :func:`normal_cg` does the same for AᵀA x = Aᵀb without forming AᵀA (CGLS; Hestenes and Stiefel, 1952).
* :func:`bicgstab` needs no transpose and no basis (van der Vorst, SIAM J. Sci. Stat. Comput. 13, 1992).
* :func:`neumann` sums the series Σ (I − A)ᵏ b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..solution import Solution, Status
from .loop import dot, norm
from .systems import MatVec, Systems, checked

__all__ = ["bicgstab", "cg", "neumann", "normal_cg"]


@torch.no_grad()
def cg(
    matvec: MatVec,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    preconditioner: MatVec | None = None,
    truncation: int | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
) -> Solution:
    """Conjugate gradients for symmetric definite A (flexible with a ``preconditioner``).

    A may be positive or negative definite. Nothing is assumed silently: an answer counts only by its true residual, so an
    indefinite A either works by luck and is verified, or ends with a status that says no.

    Args:
        matvec: ``(*batch, n) -> (*batch, n)``, the product with A, row by row.
        b: ``(*batch, n)``.
        x0: ``(*batch, n)``, the start; zero if None.
        preconditioner: ``(*batch, n) -> (*batch, n)``, an approximation of A⁻¹, possibly nonlinear. It sees residuals of norm 1,
            and only the direction of its answer matters. A direction that is of no use is replaced by the residual.
        truncation: how many past directions each new one is made A-orthogonal to; None for 1.
        tol: relative residual; None for 1e-12 in float64 and 1e-6 in float32. What rounding forbids is not asked for.
        max_iter: None for 10 n + 50, at most 10 000.

    Returns:
        :class:`~difflayers.Solution` with ``residual`` ‖b − A x‖ / ‖b‖. SINGULAR: A has a null vector and b a part along it.

    Raises:
        ShapeError: ``matvec`` or ``x0`` do not match ``b``.

    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> cg(lambda v: v @ A, torch.tensor([1.0, 2.0])).x
    tensor([0.0909, 0.6364])
    """
    return _conjugate_directions(matvec, None, b, x0, preconditioner, truncation, tol, max_iter)


@torch.no_grad()
def normal_cg(
    matvec: MatVec,
    b: Tensor,
    *,
    rmatvec: MatVec,
    x0: Tensor | None = None,
    preconditioner: MatVec | None = None,
    truncation: int | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
) -> Solution:
    """Conjugate gradients on AᵀA x = Aᵀb, for any nonsingular A whose transposed product is at hand.

    It never breaks down, but it sees the square of the condition number.

    Args:
        matvec: ``(*batch, n) -> (*batch, n)``, the product with A.
        b: ``(*batch, n)``.
        rmatvec: the product with Aᵀ.
        x0, truncation, tol: as in :func:`cg`; the tolerance is for ‖b − A x‖ / ‖b‖.
        preconditioner: an approximation of (AᵀA)⁻¹.
        max_iter: as in :func:`cg`.

    Returns:
        :class:`~difflayers.Solution`. SINGULAR: the residual is orthogonal to the range of A, and not small; x is then a
        least-squares solution.

    >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
    >>> normal_cg(lambda v: v @ A.mT, torch.tensor([2.0, 1.0]), rmatvec=lambda v: v @ A).x
    tensor([-1.,  1.])
    """
    return _conjugate_directions(matvec, rmatvec, b, x0, preconditioner, truncation, tol, max_iter)


def _conjugate_directions(
    matvec: MatVec,
    rmatvec: MatVec | None,
    b: Tensor,
    x0: Tensor | None,
    preconditioner: MatVec | None,
    truncation: int | None,
    tol: float | None,
    max_iter: int | None,
) -> Solution:
    memory = 1 if truncation is None else truncation
    if memory < 1:
        raise ValueError(f"truncation is the number of past directions to keep, at least 1, got {truncation}")
    rows = Systems(matvec, b, x0, tol, max_iter)
    x, r = rows.x, rows.r
    gradient = r if rmatvec is None else checked(rmatvec, r, "rmatvec")
    # The last `memory` directions p, their images (A p, or AᵀA p) and pᵀ(image); inf marks an empty place.
    directions, images = b.new_zeros(memory, *b.shape), b.new_zeros(memory, *b.shape)
    curvatures = b.new_full((memory, *b.shape[:-1]), torch.inf)
    plain = torch.full_like(rows.running, preconditioner is None)
    go_on = rows.any_running()
    for k in range(rows.limit):
        if not go_on:
            break
        size = norm(gradient)
        z = unit = gradient / torch.where(size == 0, 1, size)[..., None]
        if preconditioner is not None:
            z = torch.where(plain[..., None], unit, preconditioner(unit))
        overlap = (images * z).sum(-1) / curvatures
        p = z - (overlap[..., None] * directions).sum(0)
        q, p_norm, q_norm = rows.stretch(p)
        curvature = dot(p, q) if rmatvec is None else q_norm**2
        # Curvature bounds the smallest eigenvalue of a definite A; a residual that Aᵀ maps to nearly zero is a null vector of Aᵀ.
        rows.note(curvature.abs() / p_norm**2 if rmatvec is None else size / norm(r))
        step = dot(p, gradient) / curvature
        sound = torch.isfinite(step) & (curvature.abs() > 10 * rows.eps * (p_norm * q_norm if rmatvec is None else 0))
        move = rows.running & sound
        x = torch.where(move[..., None], x + step[..., None] * p, x)
        r = torch.where(move[..., None], r - step[..., None] * q, r)
        previous, gradient = gradient, r if rmatvec is None else rmatvec(r)
        image = q if rmatvec is None else (previous - gradient) / step[..., None]
        place = k % memory
        directions[place] = torch.where(move[..., None], p, directions[place])
        images[place] = torch.where(move[..., None], image, images[place])
        curvatures[place] = torch.where(move, curvature, curvatures[place])
        r_norm = norm(r)
        rows.count()
        rows.record(x, r_norm)
        # A useless preconditioned direction is tried again as the plain residual before the row gives up.
        broken = ~sound | rows.flat(10 * rows.eps)
        claim = rows.running & ((r_norm <= rows.target) | (broken & plain))
        if preconditioner is not None:
            plain = broken & ~plain
        if bool(claim.any()):
            true_residual, again = rows.verify(claim)
            x = torch.where(again[..., None], rows.x, x)
            r = torch.where(again[..., None], true_residual, r)
            gradient = r if rmatvec is None else checked(rmatvec, r, "rmatvec")
            curvatures = torch.where(again, torch.inf, curvatures)
            go_on = rows.any_running()
    return rows.solution()


@torch.no_grad()
def bicgstab(
    matvec: MatVec,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    preconditioner: MatVec | None = None,
    truncation: int | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
) -> Solution:
    """Stabilized bi-conjugate gradients for general A: constant memory, two products with A per iteration, no transpose.

    Not for matrices with eigenvalues far from the real axis, skew-symmetric ones above all: there
    :func:`~difflayers.solvers.linear.gmres` works.

    Args:
        matvec, b, x0, tol, max_iter: as in :func:`cg`.
        preconditioner: a *linear* approximation of A⁻¹, applied from the right.
        truncation: has no meaning here and must be None.

    Returns:
        :class:`~difflayers.Solution`. NUMERICAL_ERROR: the recurrence broke down.

    References:
        Sleijpen and van der Vorst, Maintaining convergence properties of BiCGstab methods, Numer. Algorithms 10, 1995.

    >>> A = torch.tensor([[4.0, 1.0], [0.0, 3.0]])
    >>> bicgstab(lambda v: v @ A.mT, torch.tensor([9.0, 3.0])).x
    tensor([2., 1.])
    """
    _refuse_truncation(truncation, "bicgstab")
    rows = Systems(matvec, b, x0, tol, max_iter)
    apply = preconditioner or (lambda v: v)
    x, r = rows.x, rows.r
    shadow, p, v = r, r, torch.zeros_like(b)
    rho = alpha = omega = torch.ones_like(rows.norm_b)
    fresh = torch.ones_like(rows.running)
    go_on = rows.any_running()
    for _ in range(rows.limit):
        if not go_on:
            break
        r_norm, rho_old = norm(r), rho
        rho = dot(shadow, r)
        beta = (rho / rho_old) * (alpha / omega)
        p = torch.where(fresh[..., None], r, r + beta[..., None] * (p - omega[..., None] * v))
        p_hat = apply(p)
        v, _, v_norm = rows.stretch(p_hat)
        denominator = dot(shadow, v)
        alpha = rho / denominator
        s = r - alpha[..., None] * v
        s_hat = apply(s)
        t, _, t_norm = rows.stretch(s_hat)
        s_norm = norm(s)
        cosine = dot(t, s) / (t_norm * s_norm)
        # A minimal-residual step that is nearly orthogonal would ruin the next rho: lengthen it.
        omega = torch.sign(cosine) * cosine.abs().clamp_min(0.7) * s_norm / t_norm
        half_way = (s_norm <= rows.target) | (t_norm == 0)
        omega = torch.where(half_way, 0, omega)
        tiny = rows.eps * norm(shadow)
        sound = torch.isfinite(alpha) & torch.isfinite(omega) & (rho.abs() > tiny * r_norm) & (denominator.abs() > tiny * v_norm)
        move = (rows.running & sound)[..., None]
        x = torch.where(move, x + alpha[..., None] * p_hat + omega[..., None] * s_hat, x)
        r = torch.where(move, s - omega[..., None] * t, r)
        r_norm = norm(r)
        rows.count()
        rows.record(x, r_norm)
        fresh = torch.zeros_like(fresh)
        claim = rows.running & ((r_norm <= rows.target) | ~sound | (omega == 0) | rows.flat(10 * rows.eps))
        if bool(claim.any()):
            true_residual, fresh = rows.verify(claim)
            x = torch.where(fresh[..., None], rows.x, x)
            r = torch.where(fresh[..., None], true_residual, r)
            shadow = torch.where(fresh[..., None], r, shadow)
            go_on = rows.any_running()
    return rows.solution()


@torch.no_grad()
def neumann(
    matvec: MatVec,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    preconditioner: MatVec | None = None,
    truncation: int | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
) -> Solution:
    """The Neumann series x = Σ_k (I − A)ᵏ b, that is x ← b + (I − A) x, for A = I − J with a spectral radius of J below 1.

    After K iterations from zero x is the sum of the first K terms, whatever the status says: truncation on purpose is
    ``max_iter=K`` (with ``tol=0`` to have exactly K).

    Args:
        matvec, b, x0, tol: as in :func:`cg`.
        max_iter: None for 10 000.
        preconditioner: M in x ← x + M(b − A x).
        truncation: has no meaning here and must be None.

    Returns:
        :class:`~difflayers.Solution`. NUMERICAL_ERROR: the series diverges; x is then the best partial sum.

    >>> J = torch.tensor([[0.5, 0.0], [0.25, 0.5]])
    >>> neumann(lambda v: v - v @ J.mT, torch.tensor([1.0, 0.0])).x
    tensor([2.0000, 1.0000])
    """
    _refuse_truncation(truncation, "neumann")
    rows = Systems(matvec, b, x0, tol, 10_000 if max_iter is None else max_iter)
    x, r = rows.x, rows.r
    go_on = rows.any_running()
    for _ in range(rows.limit):
        if not go_on:
            break
        x = torch.where(rows.running[..., None], x + (r if preconditioner is None else preconditioner(r)), x)
        r = rows.b - rows.product(x)
        r_norm = norm(r)
        rows.count()
        rows.record(x, r_norm)
        # Powers of a non-normal J may grow a good deal before they decay.
        rows.stop(~(r_norm <= 1e8 * rows.norm_b), Status.NUMERICAL_ERROR)
        rows.stop(r_norm <= rows.target, Status.SOLVED)
        go_on = rows.any_running()
    rows.x = torch.where(rows.running[..., None], x, rows.x)
    return rows.solution()


def _refuse_truncation(truncation: int | None, method: str) -> None:
    if truncation is not None:
        raise ValueError(f"truncation belongs to cg and normal_cg; {method} has no past directions")
