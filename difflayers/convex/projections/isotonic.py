r"""Isotonic regression, the projection on the cone of monotone sequences.

.. math:: \{p : p_1 \le p_2 \le \dots \le p_n\}, \qquad Π(x) = \arg\min_p \tfrac12 \sum_i w_i (p_i - x_i)^2.

Pooling adjacent violators splits the entries into blocks, and p is the weighted mean of x in each of them. The blocks are found
without a derivative; autograd differentiates the means, so the Jacobian averages over blocks.

References: Best and Chakravarti, Active set algorithms for isotonic regression, Mathematical Programming 47 (1990);
Djolonga and Krause, Differentiable learning of submodular models, NeurIPS 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ShapeError
from ...implicit.broadcasting import BroadcastingProblem
from ...implicit.closure import visible_to_modes
from ...implicit.eager import eager
from ...implicit.function import ImplicitFunction
from .arguments import check_parameter, check_rows
from .pooling import pool

__all__ = ["projection_isotonic"]


@eager
def projection_isotonic(x: Tensor, weights: Tensor | None = None, *, increasing: bool = True) -> Tensor:
    """The nearest monotone sequence.

    Differentiable in x and in the weights. Neighbours that end on the same level count as one block, whose mean they share.

    Args:
        x: ``(*batch, n)``.
        weights: ``(*batch, n)``, positive, of the squared distances; None for equal ones.
        increasing: p₁ ≤ p₂ ≤ …; else p₁ ≥ p₂ ≥ ….

    Returns:
        ``(*batch, n)``. A row that is not finite, or has a weight that is not positive, gives NaN.

    Raises:
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_isotonic
        >>> projection_isotonic(torch.tensor([1.0, 3.0, 2.0, 4.0]))
        tensor([1.0000, 2.5000, 2.5000, 4.0000])
    """
    check_rows(x, "x")
    w = torch.ones_like(x) if weights is None else check_parameter(weights, "weights", x, (x.shape[-1],))
    try:
        x, w = torch.broadcast_tensors(x, w)
    except RuntimeError as error:
        raise ShapeError(f"batch dimensions do not broadcast: x {tuple(x.shape)}, weights {tuple(w.shape)}") from error
    broken = ~(torch.isfinite(x) & torch.isfinite(w) & (w > 0)).all(-1, keepdim=True)
    safe_x, safe_w = torch.where(broken, 0, x), torch.where(broken, 1, w)
    sign = 1 if increasing else -1
    operands = visible_to_modes([(sign * safe_x).detach(), safe_w.detach()])
    block = ImplicitFunction.apply(_Pooling(x.dim() - 1), x.new_zeros(0), *operands)[1]
    # Means of deviations from the first entry of a block: large levels do not cost their digits.
    base = safe_x.detach().gather(-1, block)
    empty = torch.zeros_like(safe_x)
    weight = empty.scatter_add(-1, block, safe_w)
    deviation = empty.scatter_add(-1, block, safe_w * (safe_x - base))
    mean = deviation.gather(-1, block) / weight.gather(-1, block)
    return torch.where(broken, torch.nan, base + mean)


class _Pooling(BroadcastingProblem):
    """The blocks of each row: for each entry the index of the first one of its block."""

    core_ndims = (1, 1)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        x, w = torch.broadcast_tensors(*theta)
        n = x.shape[-1]
        rows, weights = (part.reshape(math.prod(x.shape[:-1]), n).to("cpu", torch.float64).numpy() for part in (x, w))
        ends = torch.from_numpy(pool(rows, weights))
        first = torch.repeat_interleave(ends[:-1], ends.diff()).reshape(x.shape)
        return (x0.clone(), first.remainder(max(n, 1)).to(x.device))

    def deeper(self, size: int) -> _Pooling:
        return _Pooling(self.batch_ndim + 1)
