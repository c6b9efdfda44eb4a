"""A nonnegative matrix by its large entries, where these are few, and as it is where they are not: products with it and its transpose."""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Kept"]

# Where more than this part of the entries would be kept, the dense products are the faster ones (python -m benchmarks.transport).
_DENSE = 0.2


class Kept:
    """The entries of a matrix ``(n, m)`` that are at least ``least``.

    Args:
        matrix: nonnegative; it must not change while this lives.
        least: what is smaller is dropped.

    Attributes:
        sparse: whether anything was dropped.
        density: the part of the entries that is kept.
    """

    def __init__(self, matrix: Tensor, least: float) -> None:
        self.matrix, self.shape = matrix, matrix.shape
        large = matrix >= least
        self.density = int(large.count_nonzero()) / large.numel()
        self.sparse = self.density <= _DENSE
        self.rows, self.columns = matrix, matrix.mT
        if self.sparse:
            self._i, self._j = large.nonzero().unbind(-1)
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
