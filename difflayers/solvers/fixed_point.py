"""Fixed points x = T(x), a batch at a time: Picard, Anderson and Broyden iterations with one safeguard.

With f(x) = T(x) − x, the three methods differ only in the next point that they propose:

* **Picard**: x⁺ = T(x). It contracts the error by the Lipschitz constant of T.
* **Anderson**, type II: x⁺ = T(x) − ΔT γ with γ = argmin ‖f(x) − Δf γ‖² + λ‖γ‖² over the last ``memory`` differences, which on
  a linear map is GMRES. The columns of Δf are normalized before λ is added, so λ is relative: it means the same whatever the scale
  of the problem and however small the residual has become.
* **Broyden**'s good method: x⁺ = x − H f(x), where H ≈ (∂f/∂x)⁻¹ satisfies H Δf = Δx by rank-one updates of τI. A short
  first step measures the slope of f: where T may be a contraction τ is −1, else f has a scale of its own and τ undoes it. ‖H f‖
  estimates the error of x: it, too, must be small.

A proposal that makes the residual grow tenfold, or not finite, is taken back: the row forgets its history and takes a plain
step from its best iterate.

References: Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49, 2011; Broyden, A class of
methods for solving nonlinear simultaneous equations, Math. Comp. 19, 1965; Bai, Kolter and Koltun, Deep equilibrium models, 2019
(arXiv:1909.01377).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..pytree import Raveler
from ..solution import Solution, Status
from .loop import Rows, check_options, default_tol, dot, norm, relative

__all__ = ["anderson", "broyden", "picard"]

# A proposal may enlarge the residual so much (non-normal maps do, for a while) before it is taken back.
_GROWTH = 10.0


@torch.no_grad()
def picard(map_fn: Callable[[Any], Any], x0: Any, *, batch_ndim: int = 0, tol: float | None = None, max_iter: int = 10_000) -> Solution:
    """Iterate x ← T(x).

    Args:
        map_fn: T, maps x to a pytree of the same structure.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        tol: for ‖T(x) − x‖ / ‖x‖; None for 1e-12 in float64 and 1e-6 in float32.
        max_iter: evaluations of T.

    Returns:
        :class:`~difflayers.Solution` with the best x, its residual, and the evaluations of T as ``iterations``.

    Example:
        >>> picard(torch.cos, torch.tensor(1.0)).x
        tensor(0.7391)
    """
    return iterate(map_fn, x0, batch_ndim, tol, max_iter, lambda x: None)


@torch.no_grad()
def anderson(
    map_fn: Callable[[Any], Any],
    x0: Any,
    *,
    batch_ndim: int = 0,
    tol: float | None = None,
    max_iter: int = 10_000,
    memory: int = 10,
    damping: float = 1.0,
    regularization: float | None = None,
) -> Solution:
    """Anderson acceleration, the default for fixed points.

    Args:
        map_fn: T, maps x to a pytree of the same structure.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        tol: for ‖T(x) − x‖ / ‖x‖; None for 1e-12 in float64 and 1e-6 in float32.
        max_iter: evaluations of T.
        memory: differences kept. More of them help maps with a contraction near 1.
        damping: β in x⁺ = (x − Δx γ) + β (f − Δf γ).
        regularization: λ, relative to the normalized differences; None for 100 eps.

    Returns:
        :class:`~difflayers.Solution` with the best x, its residual, and the evaluations of T as ``iterations``.

    Example:
        >>> solution = anderson(torch.cos, torch.tensor(1.0))
        >>> solution.x, bool(solution.iterations < picard(torch.cos, torch.tensor(1.0)).iterations)
        (tensor(0.7391), True)
    """
    if memory < 1:
        raise ValueError(f"memory must be at least 1, got {memory}")
    return iterate(map_fn, x0, batch_ndim, tol, max_iter, lambda x: _Anderson(x, memory, damping, regularization))


@torch.no_grad()
def broyden(
    map_fn: Callable[[Any], Any],
    x0: Any,
    *,
    batch_ndim: int = 0,
    tol: float | None = None,
    max_iter: int = 10_000,
    memory: int = 30,
) -> Solution:
    """Broyden's quasi-Newton method on T(x) − x; it does not need T to be a contraction.

    Args:
        map_fn: T, maps x to a pytree of the same structure.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        tol: for ‖T(x) − x‖ / ‖x‖; None for 1e-12 in float64 and 1e-6 in float32.
        max_iter: evaluations of T.
        memory: rank-one updates kept; when they are full they start anew.

    Returns:
        :class:`~difflayers.Solution` with the best x, its residual, and the evaluations of T as ``iterations``.

    Example:
        >>> broyden(lambda x: 4 - x**2 / 2, torch.tensor(1.5)).x
        tensor(2.)
    """
    if memory < 1:
        raise ValueError(f"memory must be at least 1, got {memory}")
    return iterate(map_fn, x0, batch_ndim, tol, max_iter, lambda x: _Broyden(x, memory))


class Accelerator(Protocol):
    estimates_error: bool

    def plain(self, x: Tensor, image: Tensor) -> Tensor:
        """The next point without a history."""
        ...

    def propose(self, x: Tensor, image: Tensor) -> Tensor:
        """The next point after T(x) = image."""
        ...

    def forget(self, where: Tensor) -> None:
        """Drop the history of some rows."""
        ...


def iterate(
    map_fn: Callable[[Any], Any],
    x0: Any,
    batch_ndim: int,
    tol: float | None,
    max_iter: int,
    make_accelerator: Callable[[Tensor], Accelerator | None],
) -> Solution:
    check_options(tol, max_iter)
    raveler = Raveler(x0, batch_ndim)
    apply = raveler.on_rows(map_fn)
    x = best_image = raveler.ravel(x0)
    tol = default_tol(x.dtype) if tol is None else tol
    # A row whose solution is zero has no scale of its own: it takes a little of its starting point's.
    least, bound = torch.finfo(x.dtype).eps ** 0.5 * norm(x), None
    rows, accelerator = Rows(x), make_accelerator(x)
    # The residual that a proposal is compared with, and whether the last step was a plain one, which is never taken back.
    reference = torch.full_like(rows.residual, torch.inf)
    plain = torch.ones_like(rows.running)
    for k in range(max_iter):
        image = apply(x)
        size = norm(image - x)
        extent = torch.maximum(norm(x), norm(image))
        # An iterate that runs away makes any residual relatively small: its norm counts only up to a bound.
        bound = 1e4 * extent if bound is None else bound
        scale = torch.maximum(torch.minimum(extent, bound), least)
        residual = relative(size, scale)
        rows.count()
        better = rows.record(x, residual)
        best_image = torch.where(better[..., None], image, best_image)
        rows.stop(plain & ~torch.isfinite(size), Status.NUMERICAL_ERROR)
        close, proposal = residual <= tol, image
        if accelerator is not None:
            lost = ~plain & ~(size <= _GROWTH * reference)
            reference = torch.where(plain, size, torch.minimum(reference, size))
            accelerator.forget(lost)
            proposal = accelerator.propose(x, image)
            if accelerator.estimates_error:
                close = close & ((norm(proposal - x) <= tol * scale) | (rows.idle >= 10) | (size == 0))
            plain = lost | ~torch.isfinite(proposal).all(-1)
            proposal = torch.where(plain[..., None], accelerator.plain(rows.x, best_image), proposal)
        rows.stop(close, Status.SOLVED)
        if k % 10 == 9:
            rows.settle(rows.idle >= 10, size / scale.clamp_min(1))
        if not rows.any_running():
            break
        x = torch.where(rows.running[..., None], proposal, rows.x)
    return rows.solution(raveler)


class _Anderson:
    estimates_error = False

    def __init__(self, x: Tensor, memory: int, damping: float, regularization: float | None) -> None:
        self.damping, self.memory = damping, memory
        self.regularization = 100 * torch.finfo(x.dtype).eps if regularization is None else regularization
        shape = (*x.shape[:-1], memory, x.shape[-1])
        # Differences of iterates and of residuals, each divided by the length of the latter, and which of them a row still uses.
        self.steps, self.changes = x.new_zeros(shape), x.new_zeros(shape)
        self.live = torch.zeros(shape[:-1], dtype=torch.bool, device=x.device)
        self.previous: tuple[Tensor, Tensor] | None = None
        self.place = 0

    def forget(self, where: Tensor) -> None:
        self.live = self.live & ~where[..., None]

    def plain(self, x: Tensor, image: Tensor) -> Tensor:
        return image

    def propose(self, x: Tensor, image: Tensor) -> Tensor:
        f = image - x
        if self.previous is not None:
            step, change = x - self.previous[0], f - self.previous[1]
            length = norm(change)[..., None]
            usable = torch.isfinite(length) & (length > 0)
            self.steps[..., self.place, :] = torch.where(usable, step / length, 0)
            self.changes[..., self.place, :] = torch.where(usable, change / length, 0)
            self.live[..., self.place] = usable.squeeze(-1)
            self.place = (self.place + 1) % self.memory
        self.previous = x, f
        gram = torch.where(self.live[..., None, :] & self.live[..., None], self.changes @ self.changes.mT, 0)
        used = self.live.to(x.dtype)
        gram = gram + torch.diag_embed(self.regularization * used + (1 - used))
        overlap = torch.where(self.live[..., None], self.changes @ f[..., None], 0)
        factor, info = torch.linalg.cholesky_ex(gram)
        gamma = torch.where((info == 0)[..., None, None], torch.cholesky_solve(overlap, factor), 0).mT
        return x - (gamma @ self.steps).squeeze(-2) + self.damping * (f - (gamma @ self.changes).squeeze(-2))


class _Broyden:
    """H = τI + Σ u vᵀ, of which only τ and the pairs (u, v) are kept."""

    estimates_error = True

    def __init__(self, x: Tensor, memory: int) -> None:
        self.memory, self.place = memory, 0
        shape = (*x.shape[:-1], memory, x.shape[-1])
        self.u, self.v = x.new_zeros(shape), x.new_zeros(shape)
        self.live = torch.zeros(shape[:-1], dtype=torch.bool, device=x.device)
        self.tau = torch.full_like(x[..., :1], -1)
        self.previous: tuple[Tensor, Tensor] | None = None
        self.measured = False

    def forget(self, where: Tensor) -> None:
        self.live = self.live & ~where[..., None]
        # The history may be innocent and τ too bold.
        self.tau = torch.where(where[..., None], self.tau / 2, self.tau)

    def plain(self, x: Tensor, image: Tensor) -> Tensor:
        return x - self.tau * (image - x)

    def propose(self, x: Tensor, image: Tensor) -> Tensor:
        f = image - x
        if self.previous is None:
            self.previous = x, f
            reach = torch.maximum(norm(x), norm(image))[..., None]
            return x + (torch.finfo(x.dtype).eps ** 0.5 * reach / norm(f)[..., None]).clamp(max=1) * f
        step, change = x - self.previous[0], f - self.previous[1]
        self.previous = x, f
        if not self.measured:
            # No contraction has a slope above 2: there plain steps would run away.
            steep = norm(change) > 2 * norm(step)
            self.tau = torch.where(steep, dot(step, change) / dot(change, change), -1)[..., None]
            self.measured = True
        if self.place == self.memory:
            self.live, self.place = torch.zeros_like(self.live), 0
        moved = self._apply(self.u, self.v, change)
        row = self._apply(self.v, self.u, step)
        denominator = dot(step, moved)
        correction = (step - moved) / denominator[..., None]
        usable = denominator.abs() > torch.finfo(x.dtype).eps * norm(step) * norm(moved)
        usable = usable & torch.isfinite(correction).all(-1) & torch.isfinite(row).all(-1)
        self.u[..., self.place, :] = torch.where(usable[..., None], correction, 0)
        self.v[..., self.place, :] = torch.where(usable[..., None], row, 0)
        self.live[..., self.place] = usable
        self.place += 1
        return x - self._apply(self.u, self.v, f)

    def _apply(self, u: Tensor, v: Tensor, vector: Tensor) -> Tensor:
        """(τI + Σ u vᵀ) applied to rows."""
        weights = torch.where(self.live[..., None], v @ vector[..., None], 0)
        return self.tau * vector + (u.mT @ weights).squeeze(-1)
