r"""Total variation of sequences: the proximal operator, exact.

.. math:: \operatorname{prox}(x) = \arg\min_u \; \tfrac12 \|u - x\|^2 + λ \sum_i w_i |u_{i+1} - u_i|.

With :math:`z_i` the running sum of :math:`u - x`, u is optimal where :math:`|z_i| \le λ w_i`, with :math:`z_i = λ w_i s_i` at a jump of
sign :math:`s_i`. So on each piece where u is constant,

.. math:: u = \operatorname{mean}(x) + \frac{λ w_r s_r - λ w_l s_l}{\text{length}},

with l and r the gaps before and after it. The pieces and signs are found without a derivative (:mod:`.level_cuts`), autograd
differentiates the means: exact to any order, wherever the pieces do not change.

References: Davies and Kovac, Local extremes, runs, strings and multiresolution, Annals of Statistics 29 (2001); Condat, A direct
algorithm for 1-D total variation denoising, IEEE Signal Processing Letters 20 (2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...convex.projections.arguments import Number, check_rows, status_reported
from ...implicit.broadcasting import BroadcastingProblem
from ...implicit.closure import visible_to_modes
from ...implicit.eager import eager
from ...implicit.function import ImplicitFunction
from ...solution import OnFailure, Status
from .difference_weights import difference_weights
from .level_cuts import level_cuts

__all__ = ["prox_tv1d"]

_SLACK = 8 * np.finfo(np.float64).eps  # beside the size of the multipliers and the square root of the length: their rounding
_CERTIFIED = 100.0  # slacks that the optimality conditions may be off by


@eager
def prox_tv1d(x: Tensor, lam: Number, weights: Tensor | None = None, *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest sequence of small total variation: ``argmin_u ½‖u − x‖² + λ Σᵢ wᵢ |uᵢ₊₁ − uᵢ|``.

    Differentiable in x, λ and the weights, to any order. Computed in float64 on the CPU, without iterations that have to converge, in
    about half a microsecond an entry. Where neighbours end on the same level and the multiplier between them is just at its bound, they
    count as one piece, whose mean they share; at λ = 0, where nothing is shared, every entry is a piece unless neighbours are equal.

    Args:
        x: ``(*batch, n)``.
        lam: λ ≥ 0, a number or ``(*batch,)``; infinite λ gives the mean.
        weights: ``(*batch, n − 1)``, nonnegative, of the differences; None for ones.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ or a weight is negative, or a row does not pass the check of its optimality
            conditions, which every row has to; these rows are NaN.

    Returns:
        ``(*batch, n)``. A row that is not finite gives NaN.

    Raises:
        NotConvergedError: λ or a weight is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.
        ValueError: λ is a negative number.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_tv1d
        >>> prox_tv1d(torch.tensor([1.0, 1.2, 0.8, 3.0, 3.3]), 0.3)
        tensor([1.1000, 1.1000, 1.1000, 3.0000, 3.0000])
    """
    check_rows(x, "x", at_least=1)
    batch, w = difference_weights(x, lam, weights, (x.shape[-1] - 1,))
    t = x.to(torch.float64).expand(*batch, -1)
    finite = torch.isfinite(t).all(-1)
    operands = visible_to_modes([t.detach(), w.detach()])
    first, signs, certified = ImplicitFunction.apply(_Pieces(len(batch)), t.new_zeros(0), *operands)[1:]
    status = torch.where(certified | ~finite, int(Status.SOLVED), int(Status.NUMERICAL_ERROR))
    certified = certified.unsqueeze(-1)
    z = torch.where(signs == 0, 0, w) * signs
    t = torch.where(certified, t, 0)
    # Means of deviations from the first entry of a piece: large levels do not cost their digits.
    base = t.detach().gather(-1, first)
    pull = torch.nn.functional.pad(z, (0, 1)) - torch.nn.functional.pad(z, (1, 0))
    empty = torch.zeros_like(t)
    length = empty.scatter_add(-1, first, torch.ones_like(t))
    deviation = empty.scatter_add(-1, first, t - base + pull)
    u = base + (deviation / length.clamp(min=1)).gather(-1, first)
    u = torch.where(certified, u, torch.nan).to(x.dtype)
    return status_reported(u, status, torch.zeros_like(u[..., 0]), "prox_tv1d (lam and weights must not be negative)", on_failure)


class _Pieces(BroadcastingProblem):
    """For each entry the index of the first one of its piece, the signs of the jumps, and whether the optimality conditions hold."""

    core_ndims = (1, 1)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        x, w = theta
        n = x.shape[-1]
        batch = torch.broadcast_shapes(x.shape[:-1], w.shape[:-1])
        rows = math.prod(batch)
        y, weights = (part.expand(*batch, -1).reshape(rows, part.shape[-1]).cpu().numpy() for part in (x, w))
        usable = np.isfinite(y).all(1) & (weights >= 0).all(1)
        y, weights = (np.where(usable[:, None], part, 0) for part in (y, weights))
        y -= y.mean(1, keepdims=True)
        width = np.ptp(y, 1)
        slack = _SLACK * math.sqrt(n) * (width + np.minimum(weights.max(1, initial=0), n * width))
        # Where a multiplier is at its bound but for rounding, there is no jump.
        signs = level_cuts(y, weights + slack[:, None])
        begins = np.concatenate([np.ones((rows, 1), dtype=bool), signs != 0], axis=1)
        first = np.maximum.accumulate(np.where(begins, np.arange(n), 0), 1)
        certified = usable & _certify(y, weights, signs, begins, _CERTIFIED * slack)
        found = (torch.from_numpy(part).reshape((*batch, *part.shape[1:])).to(x.device) for part in (first, signs, certified))
        return x0.clone(), *found

    def deeper(self, size: int) -> _Pieces:
        return _Pieces(self.batch_ndim + 1)


def _certify(y: np.ndarray, weights: np.ndarray, signs: np.ndarray, begins: np.ndarray, slack: np.ndarray) -> np.ndarray:
    """Whether u jumps with its signs, and the running sums of u − y are multipliers."""
    rows, n = y.shape
    z = np.zeros((rows, n + 1))
    z[:, 1:-1] = np.where(signs == 0, 0, weights) * signs
    starts = np.flatnonzero(begins)
    length = np.diff(starts, append=y.size)
    u = np.repeat(np.add.reduceat((y + np.diff(z, axis=1)).ravel(), starts) / length, length).reshape(rows, n)
    running = np.cumsum(u - y, axis=1)[:, :-1]
    slack = slack[:, None]
    at_bound = (signs == 0) | (np.abs(running - z[:, 1:-1]) <= slack)
    rises = (signs * np.diff(u, axis=1) >= -slack).all(1)
    return rises & at_bound.all(1) & (np.abs(running) <= weights + slack).all(1)
