"""Unknowns of any structure as one matrix: a pytree of tensors ↔ a tensor ``(*batch, n)``, one row per problem.

Solvers and the implicit function theorem think in vectors. Users think in dictionaries of parameters. The first
``batch_ndim`` dimensions of every floating leaf index independent problems; all else is flattened and concatenated.
Leaves that are not floating tensors (integers, masks, None) are no unknowns: they pass through unchanged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .errors import ShapeError

__all__ = ["Raveler", "is_differentiable", "is_floating"]


def is_differentiable(leaf: Any) -> bool:
    """Whether ``leaf`` is a real or complex floating tensor, which may carry a derivative."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def is_floating(leaf: Any) -> bool:
    """Whether ``leaf`` is a real floating tensor, the only kind of leaf that is solved for."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class Raveler:
    """The two directions between a tree like ``example`` and its matrix.

    Args:
        example: a pytree; its floating leaves share their first ``batch_ndim`` dimensions and their dtype.
        batch_ndim: how many leading dimensions index independent problems.

    Raises:
        ShapeError: no floating leaf, complex leaves, or leaves that disagree about batch shape or dtype.
    """

    def __init__(self, example: Any, batch_ndim: int = 0) -> None:
        leaves, self.spec = _pytree.tree_flatten(example)
        if any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves):
            raise ShapeError("the unknowns are complex; pass torch.view_as_real(x) and solve for real and imaginary parts")
        if not any(is_floating(leaf) for leaf in leaves):
            kinds = sorted({str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves}) or ["nothing"]
            raise ShapeError(f"the starting point has no floating tensor to solve for (it holds {', '.join(kinds)})")
        self.floating = [is_floating(leaf) for leaf in leaves]
        self.constants = [None if yes else leaf for leaf, yes in zip(leaves, self.floating, strict=True)]
        unknowns = [leaf for leaf in leaves if is_floating(leaf)]
        for leaf in unknowns:
            if leaf.dim() < batch_ndim or leaf.shape[:batch_ndim] != unknowns[0].shape[:batch_ndim]:
                shapes = ", ".join(str(tuple(leaf.shape)) for leaf in unknowns)
                raise ShapeError(f"with batch_ndim={batch_ndim} the leaves must share their first dimensions, got shapes {shapes}")
            if leaf.dtype != unknowns[0].dtype or leaf.device != unknowns[0].device:
                kinds = ", ".join(f"{leaf.dtype} on {leaf.device}" for leaf in unknowns)
                raise ShapeError(f"the leaves must share one dtype and device, got {kinds}")
        self.batch_ndim = batch_ndim
        self.shapes = [tuple(leaf.shape[batch_ndim:]) for leaf in unknowns]
        self.sizes = [math.prod(shape) for shape in self.shapes]

    def ravel(self, tree: Any) -> Tensor:
        """``tree`` (the example's structure and shapes, perhaps with more leading dimensions) as ``(*batch, n)``."""
        leaves = [leaf for leaf, yes in zip(self._leaves(tree), self.floating, strict=True) if yes]
        rows = []
        for leaf, shape, size in zip(leaves, self.shapes, self.sizes, strict=True):
            if not isinstance(leaf, Tensor) or tuple(leaf.shape[leaf.dim() - len(shape) :]) != shape:
                came = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ShapeError(f"expected a tensor whose last dimensions are {shape}, as in the starting point, got {came}")
            rows.append(leaf.reshape(*leaf.shape[: leaf.dim() - len(shape)], size) if len(shape) != 1 else leaf)
        return rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def unravel(self, matrix: Tensor) -> Any:
        """The inverse of :meth:`ravel`, constants put back in their places."""
        batch = matrix.shape[:-1]
        # Narrowed, not split: what a split returns may not be modified in place.
        ends = list(itertools.accumulate(self.sizes))
        slices = [matrix] if len(ends) == 1 else [matrix.narrow(-1, end - size, size) for end, size in zip(ends, self.sizes, strict=True)]
        pieces = iter(
            piece.reshape((*batch, *shape)) if len(shape) != 1 else piece for piece, shape in zip(slices, self.shapes, strict=True)
        )
        leaves = [next(pieces) if yes else constant for yes, constant in zip(self.floating, self.constants, strict=True)]
        return _pytree.tree_unflatten(leaves, self.spec)

    def on_rows(self, function: Callable[..., Any]) -> Callable[..., Tensor]:
        """``function(tree, *args) -> tree`` as a function of and to matrices ``(*batch, n)``."""
        return lambda matrix, *args: self.ravel(function(self.unravel(matrix), *args))

    def _leaves(self, tree: Any) -> list[Any]:
        leaves, spec = _pytree.tree_flatten(tree)
        if len(leaves) != len(self.floating) or spec != self.spec:
            raise ShapeError(f"expected the structure of the starting point, {self.spec}, got {spec}")
        return leaves
