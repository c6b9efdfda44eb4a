r"""What runs through a sorting network whose swaps are given: payloads, ranks, the permutation itself.

With the weights :math:`q_l` of the comparators in layer l, whose pairs of wires have the differences :math:`S_l^T y`, the network is

.. math:: P^T = \prod_{l = L}^{1} \bigl(I - S_l \operatorname{diag}(q_l)\, S_l^T\bigr),

a product of symmetric matrices: :math:`P^T y` runs y forwards through it, :math:`P y` backwards, and so do cotangents the other way. With
the cotangents G after layer l and the values y before it, the derivative in a weight is :math:`-(S_l^T y)(S_l^T G)`.

The result is one problem of the core, :math:`Y - P(q)^T y = 0`. Its first derivatives are computed in place: the values are run through the
network again, from checkpoints √L layers apart, so that memory is that of √L copies of y, not of L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..implicit.broadcasting import ExplicitProblem
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction, in_a_transform
from .comparators import Wiring

__all__ = ["carry"]


@eager
def carry(y: Tensor, weights: Tensor, wiring: Wiring, *, backwards: bool = False) -> Tensor:
    """Pᵀ y, or P y: ``(*batch, n, k)``.

    Args:
        y: ``(*batch, n, k)``, or ``(n, k)`` for all.
        weights: q of every comparator, ``(*batch, comparators)``.
        wiring: the network.
        backwards: from its end to its beginning.
    """
    lead = torch.broadcast_shapes(y.shape[:-2], weights.shape[:-1])
    (rows,) = ImplicitFunction.apply(_Carry(wiring, backwards, len(lead)), y.new_zeros(0), *visible_to_modes([weights, y]))
    return rows.unflatten(-1, y.shape[-2:])


class _Carry(ExplicitProblem):
    """Y − Pᵀ y = 0 in Y, as rows ``(*batch, n · k)``; the arguments are the weights and y."""

    core_ndims = (1, 2)

    def __init__(self, wiring: Wiring, backwards: bool, batch_ndim: int) -> None:
        super().__init__(batch_ndim, residual=self._residual)
        self.wiring, self.backwards = wiring, backwards

    def deeper(self, size: int) -> _Carry:
        return _Carry(self.wiring, self.backwards, self.batch_ndim + 1)

    def _steps(self, weights: Tensor, *, backwards: bool) -> list[tuple[Any, ...]]:
        steps = self.wiring.steps(weights)
        return steps[::-1] if backwards else steps

    def _wires_first(self, weights: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The weights ``(comparators, *batch, 1)``, and y on the wires ``(wires, *batch, k)``, with the same batch."""
        lead = torch.broadcast_shapes(weights.shape[:-1], y.shape[:-2])
        y = self.wiring.on_wires(y.expand(*lead, *y.shape[-2:]).movedim(-2, 0))
        return weights.expand(*lead, -1).movedim(-1, 0).unsqueeze(-1), y

    def _rows(self, y: Tensor) -> Tensor:
        return y[: self.wiring.size].movedim(0, -2).flatten(-2)

    def _residual(self, rows: Tensor, weights: Tensor, y: Tensor) -> Tensor:
        weights, y = self._wires_first(weights, y)
        for layer, weight in self._steps(weights, backwards=self.backwards):
            y = layer.moved(y, weight * layer.difference(y))
        return rows - self._rows(y)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        weights, y = self._wires_first(*theta)
        y = _copy(y)
        for step in self._steps(weights, backwards=self.backwards):
            _advance(y, *step)
        return (self._rows(y),)

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        if torch.is_grad_enabled() or in_a_transform(u):
            return super().pullback(x, theta, which, u)
        weights, y = self._wires_first(*theta)
        cotangent = _copy(self.wiring.on_wires(-u.unflatten(-1, theta[1].shape[-2:]).movedim(-2, 0)))
        slopes = torch.empty(weights.shape[:-1], dtype=u.dtype, device=u.device)
        steps = self._steps(weights, backwards=self.backwards)
        if 0 in which:
            stride = max(math.isqrt(len(steps)), 1)
            segments = [steps[i : i + stride] for i in range(0, len(steps), stride)]
            outputs = self._steps(slopes, backwards=self.backwards)
            starts = [y]
            for segment in segments[:-1]:
                starts.append(_run(starts[-1], segment)[0])
            for segment in reversed(segments):
                differences = _run(starts.pop(), segment)[1]
                for step in reversed(segment):
                    torch.sum(differences.pop().mul_(_advance(cotangent, *step)), -1, out=outputs.pop()[1])
        else:
            for step in reversed(steps):
                _advance(cotangent, *step)
        found = (-slopes.movedim(0, -1), cotangent[: self.wiring.size].movedim(0, -2))
        return [found[i].sum_to_size(theta[i].shape) for i in which]


def _copy(y: Tensor) -> Tensor:
    return y.clone(memory_format=torch.contiguous_format)


def _run(y: Tensor, steps: Sequence[tuple[Any, ...]]) -> tuple[Tensor, list[Tensor]]:
    """What the layers make of y, and the differences of the pairs before each."""
    y = _copy(y)
    return y, [_advance(y, *step) for step in steps]


def _advance(y: Tensor, layer: Any, weight: Tensor) -> Tensor:
    """One layer in place; the differences of its pairs before it."""
    difference = layer.difference(y)
    layer.move_(y, weight * difference)
    return difference
