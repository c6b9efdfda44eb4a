"""What the Krylov methods share: a batch of systems A x = b brought to unit scale, and the verdict on what was found.

The right-hand sides are divided by their largest entry, so that squares of small gradients do not underflow in float32,
and a solution is accepted by its true residual ‖b − A x‖ / ‖b‖, never by the one that a recursion carries along.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ShapeError
from ..pytree import Raveler
from ..solution import Solution, Status
from .loop import Rows, check_options, default_tol, norm

__all__ = ["MatVec", "Systems", "acceptable", "checked", "unit_scale"]

MatVec = Callable[[Tensor], Tensor]


def unit_scale(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(b / scale, scale, finite)``: rows with largest entry 1, where zero and non-finite rows become zero (with scale 1).

    Args:
        b: ``(*batch, n)``.

    Returns:
        The scaled rows ``(*batch, n)``, their scales ``(*batch, 1)``, and ``(*batch,)`` whether the row was finite.
    """
    largest = b.abs().amax(-1, keepdim=True) if b.shape[-1] else b.new_zeros(*b.shape[:-1], 1)
    finite = torch.isfinite(largest)
    scale = torch.where(finite & (largest > 0), largest, 1)
    return torch.where(finite, b / scale, 0), scale, finite.squeeze(-1)


def checked(function: MatVec, v: Tensor, name: str) -> Tensor:
    """``function(v)``, or a ShapeError if it is not like v."""
    image = function(v)
    if not isinstance(image, Tensor) or image.shape != v.shape or image.dtype != v.dtype:
        came = f"{tuple(image.shape)} {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise ShapeError(f"{name} must return a tensor like its argument, {tuple(v.shape)} {v.dtype}, got {came}")
    return image


def acceptable(residual: Tensor, target: Tensor, norm_a: Tensor, norm_x: Tensor, norm_b: Tensor) -> Tensor:
    """Whether a residual norm meets the target, or is as small as rounding allows.

    The product A x is itself uncertain by about eps·‖A‖·‖x‖, which for an ill-conditioned A is far above eps·‖b‖: x then
    solves a system as near to the given one as its rounded entries are (a small backward error), and no method can do much
    better. A residual above eps^¼·‖b‖ is never accepted: that A is singular for all that its entries can tell.
    """
    eps = torch.finfo(residual.dtype).eps
    return (residual <= target) | (residual <= torch.minimum(50 * eps * norm_a * norm_x, eps**0.25 * norm_b))


class Systems(Rows):
    """The scaled systems and the state of the loop that solves them.

    Args:
        matvec: the product with A, row by row.
        b: ``(*batch, n)``, right-hand sides.
        x0: ``(*batch, n)``, or None for zero.
        tol: relative residual, None for :func:`~difflayers.solvers.loop.default_tol`.
        max_iter: None for 10 n + 50, at most 10 000.

    Attributes:
        b: the scaled right-hand sides.
        r: b − A x of the starting points.
        limit: the number of iterations allowed.
        target: ``(*batch,)``, the norm that a residual must reach.
        norm_a: ``(*batch,)``, the largest ‖A v‖ / ‖v‖ that a product has shown, a lower bound of ‖A‖₂.
        flattest: ``(*batch,)``, the smallest one: near zero it exhibits a null vector.
    """

    def __init__(self, matvec: MatVec, b: Tensor, x0: Tensor | None, tol: float | None, max_iter: int | None) -> None:
        if not isinstance(b, Tensor) or not b.is_floating_point() or b.dim() == 0:
            raise ShapeError("b must be a real floating tensor of shape (*batch, n)")
        if x0 is not None and (x0.shape != b.shape or x0.dtype != b.dtype):
            raise ShapeError(f"x0 must be like b, {tuple(b.shape)} {b.dtype}, got {tuple(x0.shape)} {x0.dtype}")
        check_options(tol, max_iter)
        self.matvec = matvec
        self.limit = min(10 * b.shape[-1] + 50, 10_000) if max_iter is None else max_iter
        self.eps = torch.finfo(b.dtype).eps
        self.b, self.scale, self.finite = unit_scale(b)
        self.norm_b = norm(self.b)
        self.target = (default_tol(b.dtype) if tol is None else tol) * self.norm_b
        super().__init__(torch.zeros_like(b) if x0 is None else torch.where((self.norm_b > 0)[..., None], x0 / self.scale, 0))
        self.norm_a = torch.zeros_like(self.norm_b)
        self.flattest = torch.full_like(self.norm_b, torch.inf)
        self.r = self.b if x0 is None else self.b - self.product(self.x)
        self.residual = torch.where(self.norm_b > 0, norm(self.r), 0)
        self.trusted = self.x, self.residual
        self.stop(self.residual <= self.target, Status.SOLVED)

    def product(self, v: Tensor) -> Tensor:
        """A v."""
        return checked(self.matvec, v, "matvec")

    def stretch(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(A v, ‖v‖, ‖A v‖)``, remembered in ``norm_a`` and ``flattest``."""
        image = self.product(v)
        before, after = norm(v), norm(image)
        self.note(after / before)
        return image, before, after

    def note(self, ratio: Tensor) -> None:
        """Take one stretch factor into account (0/0 and overflow say nothing)."""
        known = self.running & torch.isfinite(ratio)
        self.norm_a = torch.where(known, torch.maximum(self.norm_a, ratio), self.norm_a)
        self.flattest = torch.where(known, torch.minimum(self.flattest, ratio), self.flattest)

    def flat(self, threshold: float) -> Tensor:
        """Whether A maps some vector to less than ``threshold`` of what it makes of another."""
        return self.flattest <= threshold * self.norm_a

    def verify(self, claim: Tensor) -> tuple[Tensor, Tensor]:
        """Judge running rows that claim to be solved, or unable to go on, by the true residual of their best iterate.

        Returns:
            b − A x of the best iterates, and the rows of ``claim`` that should start again from there: those whose recursion had
            drifted from the truth, as long as the truth halves from one time to the next.
        """
        claim = claim & self.running
        residual, size, solved = self._judge()
        restart = claim & ~solved & (size < 0.5 * self.trusted[1])
        self._settle(claim, size, solved)
        stuck = claim & ~restart
        self.stop(stuck & self._singular(), Status.SINGULAR)
        self.stop(stuck, Status.NUMERICAL_ERROR)
        return residual, restart

    def solution(self, raveler: Raveler | None = None) -> Solution:
        """The verdict on the rows that still run, and all of it in the caller's scale."""
        if self.any_running():
            _, size, solved = self._judge()
            self._settle(self.running, size, solved)
            self.stop(self._singular(), Status.SINGULAR)
        x, status, residual, iterations = super().solution(raveler)
        residual = torch.where(self.norm_b > 0, residual / self.norm_b, 0)
        return Solution(
            torch.where(self.finite[..., None], x * self.scale, torch.nan),
            torch.where(self.finite, status, int(Status.NUMERICAL_ERROR)),
            torch.where(self.finite, residual, torch.nan),
            iterations,
        )

    def _settle(self, claim: Tensor, size: Tensor, solved: Tensor) -> None:
        """Replace what a recursion believed about the rows of ``claim`` by the truth, or by the last trusted iterate if that is better."""
        x, before = self.trusted
        worse = claim & ~(size <= before)
        self.x = torch.where(worse[..., None], x, self.x)
        self.residual = torch.where(claim, torch.where(worse, before, size), self.residual)
        self.trusted = torch.where(claim[..., None], self.x, x), torch.where(claim, self.residual, before)
        self.stop(claim & solved, Status.SOLVED)
        self.stop(claim & ~torch.isfinite(size), Status.NUMERICAL_ERROR)

    def _judge(self) -> tuple[Tensor, Tensor, Tensor]:
        residual = self.b - self.product(self.x)
        size = norm(residual)
        accepted = acceptable(size, self.target, self.norm_a, norm(self.x), self.norm_b)
        # With a null vector in sight only the rounding of b itself is an excuse.
        exact = size <= torch.maximum(self.target, 50 * self.eps * self.norm_b)
        return residual, size, accepted & (exact | ~self._singular())

    def _singular(self) -> Tensor:
        # Only asked about rows that missed the tolerance: a near-null vector explains why.
        return self.flat(self.eps**0.75)
