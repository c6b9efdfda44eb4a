r"""The group lasso: rows, channels or any other groups of entries that become zero together.

.. math:: R(x) = \sum_g w_g \|x_g\|_2: \qquad \operatorname{prox}_{λR}(x)_g = \max\Bigl(1 - \frac{λ w_g}{\|x_g\|}, 0\Bigr)\, x_g.

The groups do not overlap, so the problem falls apart into block soft thresholds. Squares are summed by label and the threshold is
gathered back: the cost is that of one pass over x, whatever the groups.

Reference: Yuan and Lin, Model selection and estimation in regression with grouped variables, JRSS B 68 (2006).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...convex.projections.arguments import check_rows
from ...errors import ShapeError
from ...solution import OnFailure
from .arguments import Number, negative, row_weight, weights_reported

__all__ = ["GroupLabels", "Groups", "group_norms", "group_weights", "prox_group_lasso", "read_groups"]

GroupLabels = Tensor | Sequence[Sequence[int]]


class Groups(NamedTuple):
    """Which entry belongs to which group.

    Attributes:
        labels: ``(n,)`` int64; an entry of no group has the label ``count``.
        count: the number of groups.
    """

    labels: Tensor
    count: int

    def gathered(self, values: Tensor) -> Tensor:
        """For each entry the value of its group, zero for entries of none: ``(*batch, count)`` to ``(*batch, n)``."""
        return torch.nn.functional.pad(values, (0, 1)).index_select(-1, self.labels)


def prox_group_lasso(
    x: Tensor, lam: Number, groups: GroupLabels, weights: Tensor | None = None, *, on_failure: OnFailure = "raise"
) -> Tensor:
    """The proximal operator of λ Σ w_g ‖x_g‖₂: each group gets shorter by λ w_g, and zero if it is shorter.

    Args:
        x: ``(*batch, n)``.
        lam: λ ≥ 0, ``(*batch,)`` or a number.
        groups: for each entry the number of its group, ``(n,)`` integers from 0; or a list of lists of indices. An entry that is in
            none of the lists stays as it is.
        weights: w ≥ 0, ``(*batch, number of groups)``; None for ones. Yuan and Lin take the square root of the group's size.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ or a weight is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        NotConvergedError: λ or a weight is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.
        ValueError: the groups overlap, or name an entry that is not there.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_group_lasso
        >>> prox_group_lasso(torch.tensor([3.0, 4.0, 0.3, 0.4]), 1.0, [[0, 1], [2, 3]])
        tensor([2.4000, 3.2000, 0.0000, 0.0000])
    """
    check_rows(x, "x")
    members = read_groups(groups, x, None if weights is None else weights.shape[-1])
    scale = row_weight(lam, "lam", x)
    w = group_weights(weights, members.count, x)
    norms = group_norms(x, members)
    shrink = (scale * w).expand(*torch.broadcast_shapes(scale.shape[:-1], w.shape[:-1]), members.count)
    zero = norms == 0
    # A group of zeros stays one whatever λ is.
    ratio = torch.where(zero, 0, shrink) / torch.where(zero, 1, norms)
    vanished = members.gathered((norms.detach() < shrink.detach()).to(x.dtype)) > 0
    point = torch.where(vanished, 0, x - members.gathered(ratio) * x)
    violation = negative(lam, None if weights is None else weights.amin(-1)) if members.count else negative(lam)
    rule = "lam and weights must not be negative"
    return weights_reported(point, violation, "prox_group_lasso", on_failure, core_ndim=1, rule=rule)


def read_groups(groups: GroupLabels | None, x: Tensor, count: int | None) -> Groups:
    """The groups of the last dimension of x; None is each entry by itself.

    Args:
        groups: as the caller gave them.
        x: ``(*batch, n)``.
        count: the number of groups, if the weights say so.

    Raises:
        ShapeError: labels that are not ``(n,)`` integers, or another number of weights than of groups.
        ValueError: groups overlap, or name an entry that is not there.
    """
    n = x.shape[-1]
    if groups is None:
        labels, found = torch.arange(n, device=x.device), n
    elif isinstance(groups, Tensor):
        if groups.shape != (n,) or groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
            raise ShapeError(f"groups must be {n} integers, one for each entry of x, got {groups.dtype} of the shape {tuple(groups.shape)}")
        labels = groups.to(x.device, torch.int64)
        found = int(labels.max()) + 1 if n else 0
        if n and int(labels.min()) < 0:
            raise ValueError(f"groups must be numbered from 0, got {int(labels.min())}")
    else:
        labels, found = _from_lists(groups, n).to(x.device), len(groups)
    if count is None:
        count = found
    elif count < found or (count > found and not isinstance(groups, Tensor)):
        raise ShapeError(f"weights must have one entry for each of the {found} groups, got {count}")
    return Groups(labels, count)


def group_weights(weights: Tensor | None, count: int, x: Tensor) -> Tensor:
    """The weights ``(*batch, count)``, ones if there are none.

    Raises:
        ShapeError: they do not fit x.
    """
    if weights is None:
        return x.new_ones(count)
    if weights.dtype != x.dtype or weights.device != x.device:
        raise ShapeError(f"weights is {weights.dtype} on {weights.device}, x is {x.dtype} on {x.device}; convert one of them")
    try:
        torch.broadcast_shapes(weights.shape[:-1], x.shape[:-1])
    except RuntimeError as error:
        raise ShapeError(f"batch dimensions do not broadcast: x {tuple(x.shape)}, weights {tuple(weights.shape)}") from error
    return weights


def group_norms(x: Tensor, groups: Groups) -> Tensor:
    """‖x_g‖ ``(*batch, count)``, with derivative zero where it is zero.

    Args:
        x: ``(*batch, n)``.
        groups: of n entries.
    """
    # The row's largest entry is taken out, so that no square overflows.
    scale = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(*x.shape[:-1], 1)
    scale = torch.where(scale == 0, 1, scale)
    squares = (x / scale).square()
    empty = squares.new_zeros(*x.shape[:-1], groups.count + 1)
    sums = empty.index_add(-1, groups.labels, squares)[..., : groups.count]
    zero = sums == 0
    return scale * torch.where(zero, 0, torch.where(zero, 1, sums).sqrt())


def _from_lists(groups: Sequence[Sequence[int]], n: int) -> Tensor:
    labels = torch.full((n,), len(groups))
    for label, indices in enumerate(groups):
        for index in indices:
            if not -n <= index < n:
                raise ValueError(f"group {label} names entry {index}, and x has {n} entries")
            if labels[index] != len(groups):
                raise ValueError(f"entry {index} is in groups {int(labels[index])} and {label}; groups must not overlap")
            labels[index] = label
    return labels
