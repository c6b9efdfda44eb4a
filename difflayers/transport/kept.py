r"""What conjugate gradients for large plans are made of: products with the entries that matter, and the iteration.

A nonnegative matrix is kept by its large entries where these are few, and as it is where they are not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Kept", "conjugate_gradients"]

# Where more than this part of the entries would be kept, the dense products are the faster ones. A sample of the rows decides.
_DENSE, _SAMPLE = 0.2, 32

# Most iterations with dense products, about what a factorization costs; with sparse ones, one a column.
_ITERATIONS = 100


class Kept:
    """The entries of a matrix ``(n, m)`` that are at least ``least``.

    Args:
        matrix: nonnegative; it must not change while this lives.
        least: what is smaller is dropped.

    Attributes:
        sparse: whether the small entries were dropped.
        limit: the iterations of conjugate gradients beyond which a factorization is the cheaper way.
    """

    def __init__(self, matrix: Tensor, least: float) -> None:
        self.matrix, self.shape = matrix, matrix.shape
        sample = matrix[:: max(1, matrix.shape[0] // _SAMPLE)] >= least
        self.sparse = int(sample.count_nonzero()) <= _DENSE * sample.numel()
        self.limit = matrix.shape[1] if self.sparse else _ITERATIONS
        self.rows, self.columns = matrix, matrix.mT
        if self.sparse:
            self._i, self._j = (matrix >= least).nonzero().unbind(-1)
            self._order = self._j.argsort(stable=True)
            self.rows, self.columns = self._pair(matrix[self._i, self._j])

    def times(self, v: Tensor) -> Tensor:
        """The matrix times ``(m,)``."""
        return self.rows @ v

    def transposed(self, u: Tensor) -> Tensor:
        """Its transpose times ``(n,)``."""
        return self.columns @ u

    def squares_transposed(self, w: Tensor) -> Tensor:
        """The transpose of the matrix of squared entries times ``(n,)``."""
        return self._squares @ w

    @cached_property
    def _squares(self) -> Tensor:
        return self._pair(self.rows.values().square())[1] if self.sparse else self.matrix.square().mT

    def _pair(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The sparse matrix of these values, and its transpose, both by rows."""
        n, m = self.shape
        return self._compressed(self._i, self._j, values, (n, m)), self._compressed(
            self._j[self._order], self._i[self._order], values[self._order], (m, n)
        )

    @staticmethod
    def _compressed(i: Tensor, j: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
        starts = torch.zeros(shape[0] + 1, dtype=torch.int32, device=values.device)
        starts[1:] = torch.bincount(i, minlength=shape[0]).cumsum(0)
        with warnings.catch_warnings():
            # Torch calls its sparse tensors a beta version, once.
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(starts, j.int(), values, shape)


def conjugate_gradients(product: Callable[[Tensor], Tensor], scale: Tensor, rhs: Tensor, tol: float, max_iter: int) -> tuple[Tensor, bool]:
    """Solve one positive definite system, without the bookkeeping of :mod:`difflayers.solvers`, which would cost more than the products.

    Args:
        product: with the matrix.
        scale: the preconditioner, a diagonal matrix.
        rhs: ``(m,)``.
        tol: the 1-norm of the residual to reach.
        max_iter: most iterations.

    Returns:
        The solution, and whether the residual that is carried along has reached ``tol``.
    """
    x, residual, z = torch.zeros_like(rhs), rhs, scale * rhs
    p, size = z, float(rhs @ z)
    for _ in range(max_iter if size > 0 else 0):
        image = product(p)
        curvature = float(p @ image)
        if not curvature > 0:
            break
        x, residual = x.add(p, alpha=size / curvature), residual.sub(image, alpha=size / curvature)
        if float(residual.abs().sum()) <= tol:
            return x, True
        z = scale * residual
        size, before = float(residual @ z), size
        p = z.add(p, alpha=size / before)
    return x, not size > 0
