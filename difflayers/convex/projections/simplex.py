r"""Projections on the simplex, the ℓ₁ ball and the ℓ₁ sphere, by one sort.

.. math:: Δ_r = \{x \ge 0,\; 1^T x = r\}: \quad Π(x) = \max(x - τ, 0), \qquad τ = \frac{\sum_{i \in S} x_i - r}{|S|},

where the support S holds the largest k entries, with the largest k such that all of them stay nonnegative. The support is found by
sorting, without a derivative; τ is the mean over it, which autograd differentiates: the Jacobian is :math:`I_S - 1_S 1_S^T / |S|`.
The ball and the sphere are the simplex of :math:`|x|` with the signs of x.

Reference: Duchi, Shalev-Shwartz, Singer and Chandra, Efficient projections onto the ℓ₁-ball for learning in high
dimensions, ICML 2008.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...solution import OnFailure
from .arguments import Number, check_rows, negative_radius_reported, radius

__all__ = ["on_simplex", "projection_l1_ball", "projection_l1_sphere", "projection_simplex", "simplex_support"]


def projection_simplex(x: Tensor, value: Number = 1.0, *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest point of {x : x ≥ 0, Σ x = r}. An entry exactly at the threshold counts as part of the support.

    Args:
        x: ``(*batch, n)``, n ≥ 1.
        value: r, ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where r is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: r is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_simplex
        >>> projection_simplex(torch.tensor([0.8, 0.6, -1.0]))
        tensor([0.6000, 0.4000, 0.0000])
    """
    check_rows(x, "x", at_least=1)
    r = radius(value, "value", x)
    return negative_radius_reported(on_simplex(x, r), r, value, "projection_simplex", on_failure)


def projection_l1_ball(x: Tensor, max_value: Number = 1.0, *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest point of {x : ‖x‖₁ ≤ r}. On the boundary the derivative is that of the inside.

    Args:
        x: ``(*batch, n)``, n ≥ 1.
        max_value: r, ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where r is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: r is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_l1_ball
        >>> projection_l1_ball(torch.tensor([[2.0, -1.5], [0.2, 0.3]]), 1.0)
        tensor([[ 0.7500, -0.2500],
                [ 0.2000,  0.3000]])
    """
    check_rows(x, "x", at_least=1)
    r = radius(max_value, "max_value", x)
    inside = x.detach().abs().sum(-1, keepdim=True) <= r
    point = torch.where(inside, x, _signed(x, r))
    return negative_radius_reported(point, r, max_value, "projection_l1_ball", on_failure)


def projection_l1_sphere(x: Tensor, value: Number = 1.0, *, on_failure: OnFailure = "raise") -> Tensor:
    """A nearest point of {x : ‖x‖₁ = r}, which is not convex. A zero entry takes the positive sign where it has to take one.

    Args:
        x: ``(*batch, n)``, n ≥ 1.
        value: r, ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where r is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: r is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_l1_sphere
        >>> projection_l1_sphere(torch.tensor([0.1, -0.3]), 1.0)
        tensor([ 0.4000, -0.6000])
    """
    check_rows(x, "x", at_least=1)
    r = radius(value, "value", x)
    return negative_radius_reported(_signed(x, r), r, value, "projection_l1_sphere", on_failure)


def on_simplex(x: Tensor, r: Tensor) -> Tensor:
    """The projection on {x ≥ 0, Σ x = r} of rows ``(*batch, n)``, with r ``(*batch, 1)``.

    Args:
        x: the rows.
        r: their sums.
    """
    # The set moves along with its largest entry.
    shifted = x - x.detach().amax(-1, keepdim=True)
    support = simplex_support(shifted, r)
    threshold = (torch.where(support, shifted, 0).sum(-1, keepdim=True) - r) / support.sum(-1, keepdim=True)
    point = shifted - threshold
    # A NaN in x is not in the support, but the threshold carries it to the whole row.
    return torch.where((support | point.isnan()) & ~(point < 0), point, 0)


def simplex_support(x: Tensor, r: Tensor) -> Tensor:
    """Which entries of the projection are not at zero, or are there without a push: ``(*batch, n)`` bool.

    Args:
        x: ``(*batch, n)``.
        r: ``(*batch, 1)``.
    """
    x, r = x.detach(), r.detach()
    # No entry more than r below the largest one can be in the support: the sums that decide are of numbers up to 2r only.
    bounded = torch.maximum(x - x.amax(-1, keepdim=True), -2 * r.abs() - torch.finfo(x.dtype).tiny)
    ordered = bounded.sort(-1, descending=True).values
    rank = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    last = (rank * ordered >= ordered.cumsum(-1) - r).sum(-1, keepdim=True).clamp(min=1)
    return bounded >= ordered.gather(-1, last - 1)


def _signed(x: Tensor, r: Tensor) -> Tensor:
    negative = x < 0
    point = on_simplex(torch.where(negative, -x, x), r)
    return torch.where(negative, -point, point)
