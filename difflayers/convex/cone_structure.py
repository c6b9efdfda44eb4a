"""What the conic programs of a batch share: the cones, and where the entries of P and A are."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .cone_geometry import Cones

__all__ = ["Pattern", "Structure"]


class Pattern(NamedTuple):
    """Where the entries of a matrix are: ``values`` of shape ``(*batch, nnz)`` belong to ``rows`` and ``columns``."""

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    def times(self, values: Tensor, x: Tensor, *, transpose: bool = False) -> Tensor:
        """The product of the matrix, or of its transpose, with rows ``(..., columns)``."""
        into, out_of = (self.columns, self.rows) if transpose else (self.rows, self.columns)
        products = values * x.index_select(-1, out_of)
        size = self.shape[1 if transpose else 0]
        return products.new_zeros(*products.shape[:-1], size).index_add(-1, into, products)

    def dense(self, values: Tensor) -> Tensor:
        """The matrices ``(*batch, rows, columns)``."""
        flat = values.new_zeros(*values.shape[:-1], self.shape[0] * self.shape[1])
        return flat.index_add(-1, self.rows * self.shape[1] + self.columns, values).unflatten(-1, self.shape)


class Structure(NamedTuple):
    """What all the programs of a batch share: the batch, the cones, and the patterns of P (symmetric; None is zero) and A."""

    batch: tuple[int, ...]
    cones: Cones
    P: Pattern | None
    A: Pattern

    @property
    def n(self) -> int:
        """The number of unknowns."""
        return self.A.shape[1]

    @property
    def m(self) -> int:
        """The number of rows."""
        return self.A.shape[0]

    def split(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """x and v of rows ``(..., n + m)``."""
        return point.narrow(-1, 0, self.n), point.narrow(-1, self.n, self.m)
