r"""The values of a sorting network, as the solution of a triangular system.

Layer l compares pairs of wires. With :math:`y_0 = x`, and with :math:`S_l^T y = b - a` the differences of the pairs,

.. math:: d_l = S_l^T y_{l-1}, \qquad y_l = y_{l-1} - S_l h(d_l), \qquad h(d) = q(d)\,d,

where the share q that changes wires solves a regularized linear program (:mod:`difflayers.sorting.relaxations`). It is eliminated: at
saturation Ω' is infinite, and its inverse is not. The unknowns are :math:`y_0`, all the :math:`d_l` and the values :math:`y_L`, the
equations

.. math:: y_0 - x = 0, \qquad d_l - S_l^T\Big(y_0 - \sum_{j<l} S_j h(d_j)\Big) = 0, \qquad y_L - y_0 + \sum_l S_l h(d_l) = 0.

The forward pass is substitution: the network itself. So is the linear system behind a derivative: the network with the fixed weights
:math:`h'(d_l)` in place of q, run forwards for tangents and, as :math:`I - S \operatorname{diag}(h') S^T` is symmetric, backwards for
cotangents. What is kept is one number a comparator, O(n · depth).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..implicit.broadcasting import BroadcastingProblem
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction
from ..solution import Solution
from .comparators import Wiring
from .relaxations import ConditionalSwap

__all__ = ["sorted_values"]


@eager
def sorted_values(x: Tensor, wiring: Wiring, swap: ConditionalSwap) -> tuple[Tensor, Tensor]:
    """The values ``(*batch, n)`` of the network, and the difference at every comparator ``(*batch, comparators)``.

    Args:
        x: ``(*batch, n)``; a row that is not finite gives NaN in both.
        wiring: the network.
        swap: what its comparators do.
    """
    finite = torch.isfinite(x).all(-1, keepdim=True)
    operands = visible_to_modes([torch.where(finite, x, 0)])
    (rows,) = ImplicitFunction.apply(_Swaps(wiring, swap, x.dim() - 1), x.new_zeros(0), *operands)
    size = wiring.size
    return torch.where(finite, rows[..., -size:], torch.nan), torch.where(finite, rows[..., size:-size], torch.nan)


class _Swaps(BroadcastingProblem):
    """The system, in rows (y₀, d, y_L) of length n + comparators + n; the only argument is x."""

    core_ndims = (1,)

    def __init__(self, wiring: Wiring, swap: ConditionalSwap, batch_ndim: int) -> None:
        super().__init__(batch_ndim, residual=self._residual)
        self.wiring, self.swap = wiring, swap

    def deeper(self, size: int) -> _Swaps:
        return _Swaps(self.wiring, self.swap, self.batch_ndim + 1)

    def _residual(self, rows: Tensor, x: Tensor) -> Tensor:
        wiring, columns = self.wiring, rows.movedim(-1, 0)
        start, differences, values = columns.tensor_split((wiring.size, -wiring.size))
        moved = wiring.only_active(self.swap.weight(differences) * differences)
        y, residuals = wiring.on_wires(start), [start - x.movedim(-1, 0)]
        for layer, d, h in wiring.steps(differences, moved):
            residuals.append((d - layer.difference(y)).flatten(0, 1))
            y = layer.moved(y, h)
        return torch.cat([*residuals, values - y[: wiring.size]]).movedim(0, -1)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        wiring, swap, size = self.wiring, self.swap, self.wiring.size
        columns = _as_columns(theta[0])
        rows = columns.new_empty(2 * size + wiring.comparators, columns.shape[1])
        y = _copy(wiring.on_wires(columns))
        for layer, d, active in wiring.steps(rows[size:-size], wiring.only_active(rows.new_ones(wiring.comparators, 1))):
            d.copy_(layer.difference(y))
            amount = swap.weight(d).mul_(d)
            layer.move_(y, amount if wiring.wires == size else amount.mul_(active))
        rows[:size], rows[-size:] = columns, y[:size]
        return (rows.T.reshape(*theta[0].shape[:-1], rows.shape[0]),)

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        wiring, size = self.wiring, self.wiring.size
        if self._factor is None:
            self._factor = wiring.only_active(self.swap.slope(_as_columns(point[0])[size:-size]))
        slopes = self._factor
        if columns:
            slopes = slopes.unsqueeze(1).expand(-1, rhs.shape[0], -1).flatten(1)
        u = _copy(_as_columns(rhs))
        steps = wiring.steps(u[size:-size], slopes)
        y = _copy(wiring.on_wires(u[-size:] if transpose else u[:size]))
        for layer, d, slope in reversed(steps) if transpose else steps:
            if transpose:
                d -= slope * layer.difference(y)
                layer.move_(y, -d)
            else:
                d += layer.difference(y)
                layer.move_(y, slope * d)
        if transpose:
            u[:size] += y[:size]
        else:
            u[-size:] += y[:size]
        status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=u.device)
        return Solution(u.T.reshape(rhs.shape), status, rhs.new_zeros(status.shape), status)

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        return [-u[..., : self.wiring.size] for _ in which]

    def pushforward(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], tangents: Sequence[Tensor]) -> Tensor:
        return torch.nn.functional.pad(-tangents[0], (0, x.shape[-1] - self.wiring.size))


def _as_columns(rows: Tensor) -> Tensor:
    """Rows ``(*batch, n)`` as ``(n, elements)``: what is done to one wire is then done along contiguous memory."""
    return rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1]).T


def _copy(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)
