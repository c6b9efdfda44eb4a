r"""Exact ranks, where tied entries share the average of theirs, and soft ranks of lists of different lengths.

The average rank of :math:`x_i` is :math:`\tfrac12 (\#\{j : x_j < x_i\} + \#\{j : x_j \le x_i\} + 1)`: both counts are found by bisection in
the sorted row. Ranks are piecewise constant, so they have no derivative; :func:`~difflayers.sorting.soft_rank` has.

A batch of lists of different lengths is padded, with a mask. Padding is given an infinite value, which ranks it behind the items.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .arguments import Strength
from .loss_arguments import check_mask, check_rows, floating
from .soft_rank import soft_rank

__all__ = ["average_rank", "places", "soft_rank_masked"]

Regularization = Literal["l2", "kl"]


@torch.no_grad()
def average_rank(x: Tensor, *, descending: bool = False, mask: Tensor | None = None) -> Tensor:
    """The exact ranks 1, …, n as ``scipy.stats.rankdata`` gives them: tied entries share the average of theirs.

    Args:
        x: ``(*batch, n)``, floating or integers.
        descending: rank 1 is the largest entry, not the smallest.
        mask: ``(*batch, n)`` bool, True where an entry counts; None for all. Entries that do not count get no rank, but NaN.

    Returns:
        ``(*batch, n)``, of x's dtype; float64 for integers. A row where an entry that counts is NaN is NaN.

    Raises:
        ShapeError: x is not a tensor of rows, or the mask does not fit.

    Example:
        >>> import torch
        >>> from difflayers.sorting import average_rank
        >>> average_rank(torch.tensor([0.3, 0.1, 0.3, 0.7]))
        tensor([2.5000, 1.0000, 2.5000, 4.0000])
    """
    check_rows(x, "x")
    check_mask(mask, x, "x")
    x = floating(x)
    before, through = places(-x if descending else x, mask)
    ranks = (before + through + 1).to(x.dtype) / 2
    broken = x.isnan() if mask is None else x.isnan() & mask
    ranks = torch.where(broken.any(-1, keepdim=True), torch.nan, ranks)
    return ranks if mask is None else torch.where(mask, ranks, torch.nan)


def places(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many entries that count are less than each entry, and how many are less or equal: it takes the places in between.

    Args:
        x: ``(*batch, n)``, floating.
        mask: ``(*batch, n)`` bool or None.
    """
    x = x.detach().contiguous()
    if mask is not None:
        x = torch.where(mask, x, torch.inf)
    ordered = x.sort(-1).values
    before, through = torch.searchsorted(ordered, x), torch.searchsorted(ordered, x, right=True)
    if mask is None:
        return before, through
    # An item at ∞ takes no place of the padding.
    count = mask.sum(-1, keepdim=True)
    return torch.minimum(before, count - 1).clamp(min=0), torch.minimum(through, count)


def soft_rank_masked(
    x: Tensor,
    mask: Tensor | None,
    *,
    regularization: Regularization,
    regularization_strength: Strength,
    descending: bool = False,
) -> Tensor:
    """Soft ranks of the entries that count, among these alone; the others follow, and have no gradient.

    Args:
        x: ``(*batch, n)``.
        mask: ``(*batch, n)`` bool or None.
        regularization, regularization_strength, descending: as in :func:`~difflayers.sorting.soft_rank`.
    """
    if mask is not None:
        x = torch.where(mask, x, -torch.inf if descending else torch.inf)
    return soft_rank(x, regularization=regularization, regularization_strength=regularization_strength, descending=descending)
