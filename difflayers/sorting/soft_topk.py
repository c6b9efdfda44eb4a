r"""A mask of the k largest entries, relaxed.

.. math:: \max_y \; x^T y - ε\, Ω(y) \quad\text{subject to}\quad 0 \le y \le 1,\; 1^T y = k.

Without regularization y marks the k largest entries. With :math:`Ω(y) = \tfrac12 \|y\|^2` (``"l2"``) it is the projection of x / ε on the
capped simplex, with exact zeros and ones. With the entropy :math:`Ω(y) = \sum_i y_i \log y_i + (1 - y_i) \log (1 - y_i)` (``"entropic"``)

.. math:: y_i = σ(x_i / ε + ν), \qquad \sum_i σ(x_i / ε + ν) = k,

whose only unknown ν is found by Newton's method within a bracket: no further than log 2n from the middle between the k-th and the next
entry of -x / ε. Both are differentiated at their solution: the Jacobian is :math:`(D - d d^T / 1^T d) / ε`, with d = y (1 - y), or the
indicator of the entries between zero and one, and D its diagonal matrix.

References: Amos, Koltun and Kolter, The limited multi-label projection layer, 2019 (arXiv:1906.08707);
Martins and Kreutzer, Learning what's easy: fully differentiable neural easy-first taggers, EMNLP 2017.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..convex.projections.arguments import failures_reported
from ..convex.projections.box_section import projection_box_section
from ..convex.projections.scalar_root import Equation, scalar_root
from ..errors import ShapeError
from ..implicit.eager import eager
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
    # The mask does not change when all entries move together; the largest ones should not lose their digits to where they are.
    z = z - torch.where(z >= _LARGEST, -_LARGEST, z).detach().amax(-1, keepdim=True)
    mask = _capped(z, count) if regularization == "l2" else _entropic(z, count)
    return mask.to(wanted).movedim(-1, dim)


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


def _capped(z: Tensor, count: Tensor) -> Tensor:
    return projection_box_section(z, (0.0, 1.0, torch.ones_like(z), count.squeeze(-1)))


def _entropic(z: Tensor, count: Tensor) -> Tensor:
    n = z.shape[-1]
    none, every = count == 0, count == n
    # Where the mask is constant, any other k gives a finite number to put aside.
    between = torch.where(none | every, 0.5 * n, count)
    nu = scalar_root(Equation(_excess, _slope, _bracket), z, between)
    mask = torch.sigmoid(z + nu)
    return torch.where(z.isnan(), torch.nan, torch.where(none, 0.0, torch.where(every, 1.0, mask)))


def _excess(nu: Tensor, z: Tensor, count: Tensor) -> Tensor:
    return torch.sigmoid(z + nu).sum(-1, keepdim=True) - count


def _slope(nu: Tensor, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.sigmoid(z + nu)
    slope = mask * (1 - mask)
    # The rounding of z + ν counts, too.
    return slope.sum(-1, keepdim=True), 2 * count + (slope * (z + nu).abs()).sum(-1, keepdim=True)


def _bracket(z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    n = z.shape[-1]
    ordered = z.sort(-1, descending=True).values
    index = count.long().expand(*z.shape[:-1], 1)
    last, following = ordered.gather(-1, (index - 1).clamp(min=0)), ordered.gather(-1, index.clamp(max=n - 1))
    middle, width = -(last + following) / 2, torch.log(torch.tensor(2.0 * n, dtype=z.dtype, device=z.device))
    return middle - width, middle + width
