r"""A mask of the k largest entries, relaxed.

.. math:: \max_y \; x^T y - ε\, Ω(y) \quad\text{subject to}\quad 0 \le y \le 1,\; 1^T y = k.

Without regularization y marks the k largest entries. The optimality conditions leave one unknown, ν:

.. math:: y_i = σ(x_i / ε + ν), \qquad \sum_i σ(x_i / ε + ν) = k.

With :math:`Ω(y) = \tfrac12 \|y\|^2` (``"l2"``) y is the projection of x / ε on the capped simplex, with exact zeros and ones, and
:math:`σ(t) = \min(\max(t, 0), 1)`. With the entropy :math:`Ω(y) = \sum_i y_i \log y_i + (1 - y_i) \log (1 - y_i)` (``"entropic"``) σ is
the logistic function.

The mask does not change when all entries move together, so the middle between the k-th and the next largest entry is moved to where σ is a
half. Then ν is within ± 1 (l2) or ± log 2n (entropic), and Newton's method within that bracket finds it; for l2, whose sum is piecewise
linear, in finitely many steps. Both are differentiated at their solution: the Jacobian is :math:`(D - d d^T / 1^T d) / ε`, with
d = σ'(x / ε + ν) and D its diagonal matrix.

References: Amos, Koltun and Kolter, The limited multi-label projection layer, 2019 (arXiv:1906.08707);
Martins and Kreutzer, Learning what's easy: fully differentiable neural easy-first taggers, EMNLP 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..convex.projections.arguments import failures_reported
from ..convex.projections.scalar_root import Equation, scalar_root
from ..errors import ShapeError
from ..implicit.broadcasting import BroadcastingProblem
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction
from .arguments import Strength, check_choice, rows_and_strength

__all__ = ["soft_topk"]

_LARGEST = 1e100  # what an infinite entry is counted as


@eager
def soft_topk(
    x: Tensor,
    k: int | Tensor,
    *,
    regularization: Literal["l2", "entropic"] = "l2",
    regularization_strength: Strength = 1.0,
    dim: int = -1,
) -> Tensor:
    """A mask in [0, 1] that sums to k, larger where x is larger; of ``-x``, the mask of the k smallest entries.

    The weaker the regularization, the closer to marking the k largest entries. With ``"l2"`` it does so exactly as soon as the k-th
    entry exceeds the next one by the strength. With ``"entropic"`` every entry keeps a gradient.

    Args:
        x: ``(*batch, n)``, or n in another place: see ``dim``. Entries −∞ are masked, and their mask is zero as long as k others are left.
        k: from 0 to n; an integer tensor is of shape ``(*batch,)``.
        regularization: ``"l2"`` or ``"entropic"``.
        regularization_strength: ε > 0; a tensor is of shape ``(*batch,)``, and is differentiated, too.
        dim: where the largest are looked for.

    Returns:
        As x. A row that has a NaN, or a strength in a tensor that is not positive, is NaN.

    Raises:
        InfeasibleError: a k in a tensor is not within 0 and n.
        ShapeError: x is not a floating tensor of at least one dimension, k is not an integer, or shapes do not fit.
        ValueError: k or the strength is a number out of range, or the regularization is not known.

    References:
        Amos, Koltun and Kolter, 2019.

    Example:
        >>> import torch
        >>> from difflayers.sorting import soft_topk
        >>> x = torch.tensor([3.0, 1.0, 2.5, 2.0])
        >>> soft_topk(x, 2)
        tensor([1.0000, 0.0000, 0.7500, 0.2500])
        >>> soft_topk(x, 2, regularization="entropic")
        tensor([0.7029, 0.2425, 0.5893, 0.4653])
    """
    check_choice(regularization, "regularization", ("l2", "entropic"))
    x, strength, wanted = rows_and_strength(x, regularization_strength, dim)
    x, count = _with_count(x, k)
    if x.shape[-1] == 0:
        return x.to(wanted).movedim(-1, dim)
    z = (x / strength).clamp(-_LARGEST, _LARGEST)
    n = x.shape[-1]
    none, every = count == 0, count == n
    # Where the mask is constant, any other k gives a finite number to put aside.
    between = torch.where(none | every, 0.5 * n, count)
    mask, equation, half = (_capped, _CAPPED, 0.5) if regularization == "l2" else (torch.sigmoid, _ENTROPIC, 0.0)
    z = z - (_middle(z, between) - half)
    found = torch.where(none, 0.0, torch.where(every, 1.0, mask(z + scalar_root(equation, z, between))))
    return torch.where(z.isnan(), torch.nan, found).to(wanted).movedim(-1, dim)


def _with_count(x: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    """x and k with one batch; k is ``(*batch, 1)``."""
    n = x.shape[-1]
    if not isinstance(k, Tensor):
        if isinstance(k, bool) or not isinstance(k, int):
            raise ShapeError(f"k must be an integer or an integer tensor, got {type(k).__name__}")
        if not 0 <= k <= n:
            raise ValueError(f"k must be within 0 and n = {n}, got {k}")
        return x, torch.full((1,), float(k), dtype=x.dtype, device=x.device)
    if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool or k.device != x.device:
        raise ShapeError(f"k must be an integer or an integer tensor on {x.device}, got {k.dtype} on {k.device}")
    try:
        batch = torch.broadcast_shapes(k.shape, x.shape[:-1])
    except RuntimeError as error:
        raise ShapeError(f"k must have the shape {tuple(x.shape[:-1])} of the batch of x, got {tuple(k.shape)}") from error
    x = x.expand(*batch, n)
    count = k.to(x.dtype).expand(batch)
    violation = torch.maximum(-count, count - n)
    failures_reported(x, violation > 0, violation, f"soft_topk with k out of 0 to n = {n}", "raise")
    return x, count.unsqueeze(-1)


def _capped(t: Tensor) -> Tensor:
    return t.clamp(0, 1)


def _capped_excess(nu: Tensor, z: Tensor, count: Tensor) -> Tensor:
    return _capped(z + nu).sum(-1, keepdim=True) - count


def _capped_newton(nu: Tensor, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    t = z + nu
    slope = (_capped(t) == t).sum(-1, keepdim=True).to(z.dtype)
    return slope, 2 * count + slope


def _entropic_excess(nu: Tensor, z: Tensor, count: Tensor) -> Tensor:
    total, n = torch.sigmoid(z + nu).sum(-1, keepdim=True), z.shape[-1]
    return torch.log(total / count) - torch.log((n - total) / (n - count))


def _entropic_newton(nu: Tensor, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    t, n = z + nu, z.shape[-1]
    mask = torch.sigmoid(t)
    total, slope = mask.sum(-1, keepdim=True), mask * (1 - mask)
    rate = n / (total * (n - total))
    # The rounding of z + ν counts, too.
    return rate * slope.sum(-1, keepdim=True), rate * (2 * count + (slope * t.abs()).sum(-1, keepdim=True))


def _bracket(reach: Callable[[int], float]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def bracket(z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        end = torch.full_like(count, reach(z.shape[-1]))
        return -end, end

    return bracket


_CAPPED = Equation(_capped_excess, _capped_newton, _bracket(lambda n: 1.0))
_ENTROPIC = Equation(_entropic_excess, _entropic_newton, _bracket(lambda n: math.log(2 * n)))


def _middle(z: Tensor, count: Tensor) -> Tensor:
    """Half-way between the entries of ranks k and k + 1 from above, ``(*batch, 1)``, without a derivative."""
    return ImplicitFunction.apply(_Middle(z.dim() - 1), z.new_zeros(0), *visible_to_modes([z.detach(), count]))[1]


class _Middle(BroadcastingProblem):
    """Two entries of the sorted rows, on plain tensors, for all elements of all vmaps at once."""

    core_ndims = (1, 1)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        z, count = theta
        # On the CPU, NumPy is the faster one to sort.
        ordered = torch.from_numpy(np.sort(z.numpy(), -1)) if z.device.type == "cpu" else z.sort(-1).values
        batch, n = torch.broadcast_shapes(z.shape[:-1], count.shape[:-1]), z.shape[-1]
        place = (n - count.long()).expand(*batch, 1)
        ordered = ordered.expand(*batch, n)
        middle = (ordered.gather(-1, place.clamp(max=n - 1)) + ordered.gather(-1, (place - 1).clamp(min=0))) / 2
        # NaN comes last.
        return x0.clone(), torch.where(ordered[..., -1:].isnan(), torch.nan, middle)

    def deeper(self, size: int) -> _Middle:
        return _Middle(self.batch_ndim + 1)
