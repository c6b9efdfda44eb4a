r"""Sums over all pairs of two point clouds, block by block, in value and in derivatives of every order.

A function of some rows :math:`r_i` and of everything else s gives an output for each row, and contributions to sums over all rows,

.. math:: (r, s) \mapsto \Big( \big(u(r_i, s)\big)_i, \; \sum_i v(r_i, s) \Big) .

It is evaluated on blocks of rows, so that what it needs inside, a matrix of rows × columns, is never there as a whole. Its pullback, in
the rows, in the others and in the cotangents of both outputs, and its pushforward are functions of that very form: each is evaluated in
blocks, too, and differentiated as this one is. No derivative keeps more than its arguments.

The idea of sums over pairs that are never stored: Charlier, Feydy, Glaunès, Collin and Durif, Kernel operations on the GPU, with autodiff,
without memory overflows, Journal of Machine Learning Research 22 (2021), arXiv:2004.11127.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..implicit.broadcasting import ExplicitProblem
from ..implicit.function import apply_anywhere
from ..solvers.linearize import jvp, vjp

__all__ = ["BlockFunction", "blockwise"]

# ``(rows, others) -> (outputs of the rows, contributions to the sums)``; all of shape (*batch, ., .)
BlockFunction = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]


def blockwise(
    function: BlockFunction,
    rows: Sequence[Tensor],
    others: Sequence[Tensor],
    outputs: tuple[Sequence[int], Sequence[tuple[int, int]]],
    block: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """``function`` on blocks of rows: the outputs of all rows, and the sums.

    Args:
        function: broadcasts over leading dimensions, each element of the batch on its own.
        rows: ``(*batch, n, k)`` each, sliced along n.
        others: ``(*batch, m, k)`` each, given to every block whole.
        outputs: the last dimension of each output ``(*batch, n, k)``, and the last two of each sum.
        block: rows at a time.
    """
    theta = [*rows, *others]
    batch = torch.broadcast_shapes(*(leaf.shape[:-2] for leaf in theta))
    problem = _BlockSum(len(batch), function, len(rows), outputs, block)
    sizes = problem.sizes(rows[0].shape[-2])
    start = rows[0].detach().new_zeros(()).expand((*batch, sum(sizes)))
    return problem.split(apply_anywhere(problem, start, *theta)[0], rows[0].shape[-2])


class _BlockSum(ExplicitProblem):
    """x − X(rows, others) = 0, with all the outputs in one vector x ``(*batch, .)``."""

    def __init__(
        self, batch_ndim: int, function: BlockFunction, rows: int, outputs: tuple[Sequence[int], Sequence[tuple[int, int]]], block: int
    ) -> None:
        super().__init__(batch_ndim)
        self.function, self.rows, self.outputs, self.block = function, rows, outputs, block

    def align(self, theta: list[Any], in_dims: Sequence[int | None]) -> tuple[list[Any], tuple[int | None, ...]]:
        """θ with the new dimension in front; every core has two dimensions."""
        self.core_ndims = (2,) * len(theta)
        return super().align(theta, in_dims)

    def sizes(self, n: int) -> list[int]:
        """How many numbers each output has."""
        return [n * width for width in self.outputs[0]] + [left * right for left, right in self.outputs[1]]

    def split(self, x: Tensor, n: int) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of the rows, and the sums."""
        parts = x.split(self.sizes(n), -1)
        shapes = [(n, width) for width in self.outputs[0]] + list(self.outputs[1])
        parts = [part.reshape(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]
        return parts[: len(self.outputs[0])], parts[len(self.outputs[0]) :]

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """The value, on plain tensors."""
        theta = self._expanded(x0, theta)
        rows, others = theta[: self.rows], theta[self.rows :]
        # What is kept has its place from the start: small pieces kept among freed blocks would leave memory in shreds.
        total = x0.new_zeros(x0.shape)
        per_row, sums = self.split(total, rows[0].shape[-2])
        for start in range(0, rows[0].shape[-2], self.block):
            place = slice(start, start + self.block)
            outputs, contributions = self.function([leaf[..., place, :] for leaf in rows], others)
            for kept, piece in zip(per_row, outputs, strict=True):
                kept[..., place, :] = piece
            for kept, contribution in zip(sums, contributions, strict=True):
                kept += contribution
        return (total,)

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        """−X'ᵀ u, in blocks."""
        full = self._expanded(x, theta)
        rows, others, n = full[: self.rows], full[self.rows :], full[0].shape[-2]
        row_weights, sum_weights = self.split(u, n)
        moving = [i for i in which if i < self.rows], [i - self.rows for i in which if i >= self.rows]
        outputs = [rows[i].shape[-1] for i in moving[0]], [(others[i].shape[-2], others[i].shape[-1]) for i in moving[1]]
        function = _Pullback(self.function, (len(rows), len(others)), moving)
        found = blockwise(function, [*rows, *row_weights], [*others, *sum_weights], outputs, self.block)
        slopes = dict(zip((*moving[0], *(i + self.rows for i in moving[1])), [*found[0], *found[1]], strict=True))
        return [-slopes[i].sum_to_size(theta[i].shape) for i in which]

    def pushforward(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], tangents: Sequence[Tensor]) -> Tensor:
        """−X' t, in blocks."""
        full = self._expanded(x, theta)
        moved = [tangent.expand(full[i].shape) for i, tangent in zip(which, tangents, strict=True)]
        rows, others = full[: self.rows], full[self.rows :]
        moving = [i for i in which if i < self.rows], [i - self.rows for i in which if i >= self.rows]
        row_tangents = [moved[k] for k, i in enumerate(which) if i < self.rows]
        other_tangents = [moved[k] for k, i in enumerate(which) if i >= self.rows]
        function = _Pushforward(self.function, (len(rows), len(others)), moving, len(self.outputs[0]))
        found = blockwise(function, [*rows, *row_tangents], [*others, *other_tangents], self.outputs, self.block)
        return -torch.cat([leaf.flatten(-2) for leaf in [*found[0], *found[1]]], -1)

    def deeper(self, size: int) -> _BlockSum:
        """The same problem with one more leading dimension."""
        return _BlockSum(self.batch_ndim + 1, self.function, self.rows, self.outputs, self.block)

    def _expanded(self, x: Tensor, theta: Sequence[Any]) -> list[Tensor]:
        return [leaf.expand((*x.shape[:-1], *leaf.shape[-2:])) for leaf in theta]


class _Derivative:
    """What the derivatives of a block function share.

    Args:
        function: the block function.
        counts: how many rows and others it takes; what comes after them are cotangents or tangents.
        moving: the rows and the others that it is differentiated in.
    """

    def __init__(self, function: BlockFunction, counts: tuple[int, int], moving: tuple[Sequence[int], Sequence[int]]) -> None:
        self.function, self.counts, self.moving = function, counts, moving

    def flat(self, rows: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Callable[..., Tensor], list[Tensor], list[torch.Size]]:
        """The function of what moves with its outputs in one vector, where it stands, and, once it was called, the outputs' shapes."""
        shapes: list[torch.Size] = []

        def function(*values: Tensor) -> Tensor:
            row_values, other_values = list(rows), list(others)
            for target, places, parts in (
                (row_values, self.moving[0], values[: len(self.moving[0])]),
                (other_values, self.moving[1], values[len(self.moving[0]) :]),
            ):
                for i, value in zip(places, parts, strict=True):
                    target[i] = value
            outputs, sums = self.function(row_values, other_values)
            shapes[:] = [leaf.shape for leaf in [*outputs, *sums]]
            return torch.cat([leaf.flatten(-2) for leaf in [*outputs, *sums]], -1)

        return function, [rows[i] for i in self.moving[0]] + [others[i] for i in self.moving[1]], shapes


class _Pullback(_Derivative):
    """Rows and others, each with their cotangents behind them, to the gradients in what moves."""

    def __call__(self, rows: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        weights = [*rows[self.counts[0] :], *others[self.counts[1] :]]
        function, values, _ = self.flat(rows[: self.counts[0]], others[: self.counts[1]])
        slopes = vjp(function, *values)[1](torch.cat([weight.flatten(-2) for weight in weights], -1))
        return slopes[: len(self.moving[0])], slopes[len(self.moving[0]) :]


class _Pushforward(_Derivative):
    """Rows and others, each with the tangents of what moves behind them, to the tangents of the outputs."""

    def __init__(
        self, function: BlockFunction, counts: tuple[int, int], moving: tuple[Sequence[int], Sequence[int]], row_outputs: int
    ) -> None:
        super().__init__(function, counts, moving)
        self.row_outputs = row_outputs

    def __call__(self, rows: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        tangents = (*rows[self.counts[0] :], *others[self.counts[1] :])
        function, values, shapes = self.flat(rows[: self.counts[0]], others[: self.counts[1]])
        moved = jvp(function, tuple(values), tangents)[1]
        parts = [part.reshape(shape) for part, shape in zip(moved.split([s[-2] * s[-1] for s in shapes], -1), shapes, strict=True)]
        return parts[: self.row_outputs], parts[self.row_outputs :]
