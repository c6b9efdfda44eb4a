"""Dense factors of a batch of matrices, solved as often as needed, with the failed elements kept apart.

PA = LU, or A = LLᵀ where A is positive definite. A pivot is what remains of a_ii after subtracting Σ_k l_ik u_ki; one that is
not larger than the rounding of that sum is noise, and its matrix singular to working precision. The test compares a pivot with
its own sum, so it doesn't mistake a badly scaled matrix for a singular one. Each solve is refined once with its residual
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapters 9, 10 and 12).

Call these on physical tensors only: ``torch.linalg.solve`` and ``lu_solve`` are silently wrong under nested ``vmap`` (seen in
torch 2.13), so the package's autograd Function calls them inside itself and gives ``vmap`` a rule of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ShapeError
from ..solution import Solution, Status
from .loop import default_tol
from .systems import acceptable, unit_scale

__all__ = ["DenseFactor", "cholesky_factor", "lu_factor"]


@torch.no_grad()
def lu_factor(A: Tensor) -> DenseFactor:
    """Factor any square matrices.

    Args:
        A: ``(*batch, n, n)``.

    Returns:
        :class:`DenseFactor`.

    Raises:
        ShapeError: ``A`` is not a floating tensor of square matrices.

    >>> factor = lu_factor(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    >>> factor.solve(torch.tensor([2.0, 3.0])).x
    tensor([3., 1.])
    """
    return DenseFactor(A, positive_definite=False)


@torch.no_grad()
def cholesky_factor(A: Tensor) -> DenseFactor:
    """Factor symmetric matrices that ought to be positive definite; the elements that are not are factored by LU.

    Args:
        A: ``(*batch, n, n)``, symmetric: the factor reads the lower triangle, the residuals all of it.

    Returns:
        :class:`DenseFactor`.

    Raises:
        ShapeError: ``A`` is not a floating tensor of square matrices.

    >>> factor = cholesky_factor(torch.tensor([[4.0, 0.0], [0.0, 2.0]]))
    >>> factor.solve(torch.tensor([4.0, 3.0])).x
    tensor([1.0000, 1.5000])
    """
    return DenseFactor(A, positive_definite=True)


class DenseFactor:
    """The factors of ``(*batch, n, n)`` matrices; made by :func:`lu_factor` and :func:`cholesky_factor`.

    Attributes:
        singular: ``(*batch,)`` bool, the elements that have no factor: singular to working precision, or not finite.
    """

    def __init__(self, A: Tensor, *, positive_definite: bool) -> None:
        if not isinstance(A, Tensor) or not A.is_floating_point() or A.dim() < 2 or A.shape[-1] != A.shape[-2]:
            came = f"{tuple(A.shape)} {A.dtype}" if isinstance(A, Tensor) else type(A).__name__
            raise ShapeError(f"expected floating square matrices (*batch, n, n), got {came}")
        self._norm_a = A.abs().sum(-1).amax(-1) if A.shape[-1] else A.new_zeros(A.shape[:-2])
        self._finite = torch.isfinite(self._norm_a)
        identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        # A failed element becomes the identity: LAPACK refuses NaN, and its neighbours need not know.
        self._matrix = A if bool(self._finite.all()) else torch.where(self._finite[..., None, None], A, identity)
        noise = max(A.shape[-1], 8) * torch.finfo(A.dtype).eps
        self._lower: Tensor | None = None
        self._lu: tuple[Tensor, Tensor] | None = None
        self._indefinite = torch.ones_like(self._finite)
        self.singular = ~self._finite
        if positive_definite:
            lower, info = torch.linalg.cholesky_ex(self._matrix)
            self._indefinite = info != 0
            # The sum that a pivot is left from begins with a_ii.
            lost = lower.diagonal(dim1=-2, dim2=-1) ** 2 <= noise * self._matrix.diagonal(dim1=-2, dim2=-1).abs()
            self.singular = self.singular | (~self._indefinite & lost.any(-1))
            self._lower = torch.where((self._indefinite | self.singular)[..., None, None], identity, lower)
        if not positive_definite or bool(self._indefinite.any()):
            lu, pivots, _ = torch.linalg.lu_factor_ex(self._matrix)
            pivot = lu.diagonal(dim1=-2, dim2=-1).abs()
            # The sums behind the pivots cost as much as the factorization, and only matter where some pivot is small.
            if bool((self._indefinite[..., None] & ~(pivot > torch.finfo(A.dtype).eps ** 0.5 * self._norm_a[..., None])).any()):
                size = lu.abs()
                origin = (size.tril(-1) * size.mT).sum(-1) + pivot
                # written so that NaN counts as lost
                lost = ~(pivot > noise * origin)
                self.singular = self.singular | (self._indefinite & lost.any(-1))
                lu = torch.where(self.singular[..., None, None], identity, lu)
            self._lu = lu, pivots

    @torch.no_grad()
    def solve(self, b: Tensor, transpose: bool = False) -> Solution:
        """Solve A x = b, or Aᵀ x = b.

        Args:
            b: ``(*batch, n)``, or ``(*rhs, *batch, n)`` with any leading dimensions: they are columns of one triangular solve.
            transpose: solve with Aᵀ, by the same factors.

        Returns:
            :class:`~difflayers.Solution` with x like ``b``, and ``status`` and ``residual`` ‖b − A x‖ / ‖b‖ of shape ``b.shape[:-1]``.
            A singular element (SINGULAR) or one with numbers that are not finite (NUMERICAL_ERROR) has NaN rows, and zeros
            where its b is exactly zero, so that an element which failed and receives no gradient sends none on.

        Raises:
            ShapeError: ``b`` does not match A.
        """
        A = self._matrix.mT if transpose else self._matrix
        batch = A.shape[:-1]
        if not isinstance(b, Tensor) or b.dtype != A.dtype or b.dim() < len(batch) or b.shape[b.dim() - len(batch) :] != batch:
            came = f"{tuple(b.shape)} {b.dtype}" if isinstance(b, Tensor) else type(b).__name__
            raise ShapeError(f"b must be a {A.dtype} tensor whose last dimensions are {tuple(batch)}, got {came}")
        rows, scale, finite = unit_scale(b)
        columns = rows.reshape(math.prod(b.shape[: b.dim() - len(batch)]), *batch).movedim(0, -1)
        x = self._apply(columns, transpose)
        residual = columns - A @ x
        correction = self._apply(residual, transpose)
        refined = x + correction
        refined_residual = columns - A @ refined
        before, after, norm_x, norm_b = (torch.linalg.vector_norm(t, dim=-2) for t in (residual, refined_residual, x, columns))
        better = after <= before
        x, size = torch.where(better[..., None, :], refined, x), torch.where(better, after, before)
        # A correction as large as the solution means that rounding alone decides x, whatever the pivots looked like.
        singular = self.singular[..., None] | (torch.linalg.vector_norm(correction, dim=-2) > 0.1 * norm_x)
        solved = acceptable(size, default_tol(b.dtype) * norm_b, self._norm_a[..., None], norm_x, norm_b) & ~singular
        status = torch.where(singular & self._finite[..., None], int(Status.SINGULAR), int(Status.NUMERICAL_ERROR))
        status = torch.where(solved | (norm_b == 0), int(Status.SOLVED), status)
        failed = singular & (norm_b > 0)
        x = torch.where(norm_b[..., None, :] > 0, torch.where(failed[..., None, :], torch.nan, x), 0)
        residual = torch.where(norm_b > 0, torch.where(failed, torch.nan, size / norm_b), 0)
        x = x.movedim(-1, 0).reshape(b.shape) * torch.where(finite[..., None], scale, torch.nan)
        status, residual = (t.movedim(-1, 0).reshape(b.shape[:-1]) for t in (status, residual))
        status = torch.where(finite, status, int(Status.NUMERICAL_ERROR))
        return Solution(x, status, torch.where(finite, residual, torch.nan), torch.zeros_like(status))

    def _apply(self, columns: Tensor, transpose: bool) -> Tensor:
        """The factors' inverse on ``(*batch, n, k)``."""
        x = columns
        if self._lower is not None:
            half = torch.linalg.solve_triangular(self._lower, columns, upper=False)
            x = torch.linalg.solve_triangular(self._lower.mT, half, upper=True)
        if self._lu is not None:
            by_lu = torch.linalg.lu_solve(*self._lu, columns, adjoint=transpose)
            x = torch.where(self._indefinite[..., None, None], by_lu, x)
        return x
