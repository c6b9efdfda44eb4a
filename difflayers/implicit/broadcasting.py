"""Problems of the core whose functions broadcast over leading dimensions by themselves, so that vmap only adds one more."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..solution import OnFailure, Solution
from .function import Problem
from .methods import LinearMethod

__all__ = ["BroadcastingProblem", "ExplicitProblem", "not_there"]


def not_there(*_: Any) -> Any:
    """In the place of a solver or a residual that is never called."""
    raise RuntimeError("this problem finds its own solution, and has a residual only where something is differentiated through it")


class BroadcastingProblem(Problem, abc.ABC):
    """A problem whose θ have shapes ``(*batch, *core)``, where a batch may lack leading dimensions or have ones in it.

    It finds its solution by itself, in :meth:`find`, and solves its linear systems by itself where it has derivatives.

    Args:
        batch_ndim: leading dimensions of x that index independent problems.
        residual: ``(x, *theta) -> (*batch, n)``; None where nothing that is found has a derivative.
        on_failure: what happens to a derivative whose linear system has no solution.

    Attributes:
        core_ndims: for each of θ the dimensions that are not batch.
    """

    core_ndims: tuple[int, ...] = ()

    def __init__(self, batch_ndim: int, *, residual: Callable[..., Tensor] | None = None, on_failure: OnFailure = "raise") -> None:
        super().__init__(residual or not_there, not_there, LinearMethod(), batch_ndim=batch_ndim, on_failure=on_failure)

    @abc.abstractmethod
    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """Solve on plain tensors: x, and then what has no derivative."""

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


class ExplicitProblem(BroadcastingProblem):
    """x − X(θ) = 0: x is given by a formula, whose first derivatives there is a better way to than autograd's. ∂F/∂x is the identity."""

    def operator(self, point: Sequence[Any], transpose: bool) -> Callable[[Tensor], Tensor]:
        """The identity."""
        return lambda u: u

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        """The identity."""
        status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
        return Solution(rhs.clone(), status, rhs.new_zeros(rhs.shape[:-1]), status)
