r"""FISTA as a way to find a fixed point x = T(x) of a proximal-gradient map, row by row.

.. math:: x_{k+1} = T(y_k), \qquad y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k), \qquad
    t_{k+1} = \tfrac12 \Bigl(1 + \sqrt{1 + 4 t_k^2}\Bigr).

The momentum changes from step to step, so no single map has these iterates. But where they stop x = y = T(x): the fixed point, and
with it every derivative, is that of proximal gradient. A row restarts its momentum when that points uphill, ⟨y_k − x_{k+1}, x_{k+1} −
x_k⟩ > 0, which makes the rate linear where the problem is strongly convex, whether or not its constant is known.

References: Beck, Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse problems, SIAM J. Imaging Sci. 2, 2009;
O'Donoghue, Candès, Adaptive restart for accelerated gradient schemes, Found. Comput. Math. 15, 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..solution import Solution
from ..solvers.fixed_point import iterate
from ..solvers.loop import dot

__all__ = ["fista"]


@torch.no_grad()
def fista(map_fn: Callable[[Any], Any], x0: Any, *, batch_ndim: int = 0, tol: float | None = None, max_iter: int = 10_000) -> Solution:
    """Find x = T(x) by steps with momentum, for a T that is a step of proximal gradient.

    Args:
        map_fn: T, maps x to a pytree of the same structure.
        x0: the starting point, a pytree of tensors ``(*batch, ...)``.
        batch_ndim: how many leading dimensions index independent problems.
        tol: for ‖T(x) − x‖ / ‖x‖; None for 1e-12 in float64 and 1e-6 in float32.
        max_iter: evaluations of T.

    Returns:
        :class:`~difflayers.Solution` with the best x, its residual, and the evaluations of T as ``iterations``.
    """
    return iterate(map_fn, x0, batch_ndim, tol, max_iter, _Momentum)


class _Momentum:
    estimates_error = False

    def __init__(self, x: Tensor) -> None:
        self.t = torch.ones_like(x[..., 0])
        self.previous = x

    def forget(self, where: Tensor) -> None:
        self.t = torch.where(where, 1.0, self.t)

    def plain(self, x: Tensor, image: Tensor) -> Tensor:
        return image

    def propose(self, x: Tensor, image: Tensor) -> Tensor:
        step = image - self.previous
        self.previous = image
        self.forget(dot(x - image, step) > 0)
        longer = (1 + torch.sqrt(1 + 4 * self.t**2)) / 2
        weight = (self.t - 1) / longer
        self.t = longer
        return image + weight[..., None] * step
