"""Problems of the core whose functions broadcast over leading dimensions by themselves, so that vmap only adds one more."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from .function import Problem

__all__ = ["BroadcastingProblem"]


class BroadcastingProblem(Problem, abc.ABC):
    """A problem whose θ have shapes ``(*batch, *core)``, where a batch may lack leading dimensions or have ones in it.

    Attributes:
        core_ndims: for each of θ the dimensions that are not batch.
    """

    core_ndims: tuple[int, ...] = ()

    @abc.abstractmethod
    def deeper(self, size: int) -> BroadcastingProblem:
        """The same problem with one more leading batch dimension, of that size."""

    def batched(self, in_dims: tuple[int | None, ...], size: int, randomness: str) -> Problem:
        """The same problem with one more leading batch dimension; one object, so that its factorization is found again."""
        key = (in_dims, size)
        if key not in self._batched:
            self._batched[key] = self.deeper(size)
        return self._batched[key]

    def align(self, theta: list[Any], in_dims: Sequence[int | None]) -> tuple[list[Any], tuple[int | None, ...]]:
        """θ with the new dimension in front and ones behind it, so that they broadcast against each other."""
        moved = []
        for leaf, dim, core in zip(theta, in_dims, self.core_ndims, strict=True):
            if dim is not None:
                missing = 1 + self.batch_ndim + core - leaf.dim()
                leaf = leaf.movedim(dim, 0)
                leaf = leaf.reshape(leaf.shape[0], *[1] * missing, *leaf.shape[1:])
            moved.append(leaf)
        return moved, tuple(None if dim is None else 0 for dim in in_dims)
