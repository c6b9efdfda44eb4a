r"""Projections with a formula: half-spaces, boxes, balls and spheres.

.. math::
   \{x \ge 0\}: \max(x, 0) \qquad \{l \le x \le u\}: \min(\max(x, l), u) \qquad
   \{\|x\|_2 \le r\}: \min(1, r / \|x\|)\, x

   \{a^T x = b\}: x - \frac{a^T x - b}{a^T a}\, a \qquad \{a^T x \le b\}: x - \frac{\max(a^T x - b, 0)}{a^T a}\, a

Autograd follows the formulas. A constraint that holds with equality and does not push (on the boundary, from the inside) counts as
inactive: the derivative there is that of the inside.

Reference: Parikh and Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1 (2014), chapter 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError
from ...solution import OnFailure
from .arguments import Number, check_parameter, check_rows, failures_reported, negative_radius_reported, radius

__all__ = [
    "projection_box",
    "projection_halfspace",
    "projection_hyperplane",
    "projection_l2_ball",
    "projection_l2_sphere",
    "projection_linf_ball",
    "projection_non_negative",
]


def projection_non_negative(x: Tensor, hyperparams: None = None) -> Tensor:
    """The nearest point of {x : x ≥ 0}: max(x, 0). At zero the derivative is one.

    Args:
        x: any shape.
        hyperparams: not used; the place where the other projections have their parameters.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_non_negative
        >>> projection_non_negative(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    return torch.where(x < 0, 0, x)


def projection_box(x: Tensor, hyperparams: tuple[Number, Number], *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest point of {x : l ≤ x ≤ u}. At a bound the derivative is that of the inside.

    Args:
        x: ``(*batch, n)``.
        hyperparams: (l, u), each ``(*batch, n)`` or a number; infinite entries are no bounds.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where l > u.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: l > u somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_box
        >>> projection_box(torch.tensor([-1.0, 0.5, 4.0]), (0.0, torch.tensor([1.0, 1.0, 2.0])))
        tensor([0.0000, 0.5000, 2.0000])
    """
    check_rows(x, "x")
    lower, upper = (
        check_parameter(side, name, x, (x.shape[-1],) if isinstance(side, Tensor) else ())
        for side, name in zip(hyperparams, ("lower", "upper"), strict=True)
    )
    point = _clipped(x, lower, upper)
    excess = (lower - upper).detach().broadcast_to(point.shape) if x.shape[-1] else point.new_zeros(*point.shape[:-1], 1)
    return failures_reported(point, (excess > 0).any(-1), excess.amax(-1), "projection_box", on_failure)


def projection_linf_ball(x: Tensor, max_value: Number = 1.0, *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest point of {x : ‖x‖∞ ≤ r}. On the boundary the derivative is that of the inside.

    Args:
        x: ``(*batch, n)``.
        max_value: r, ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where r is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: r is negative somewhere (``on_failure="raise"``).

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_linf_ball
        >>> projection_linf_ball(torch.tensor([-3.0, 0.5]), 1.0)
        tensor([-1.0000,  0.5000])
    """
    check_rows(x, "x")
    r = radius(max_value, "max_value", x)
    return negative_radius_reported(_clipped(x, -r, r), r, max_value, "projection_linf_ball", on_failure)


def projection_l2_ball(x: Tensor, max_value: Number = 1.0, *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest point of {x : ‖x‖₂ ≤ r}. On the boundary the derivative is that of the inside.

    Args:
        x: ``(*batch, n)``.
        max_value: r, ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where r is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: r is negative somewhere (``on_failure="raise"``).

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_l2_ball
        >>> projection_l2_ball(torch.tensor([3.0, 4.0]), 1.0)
        tensor([0.6000, 0.8000])
    """
    check_rows(x, "x")
    r = radius(max_value, "max_value", x)
    inside = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) <= r
    direction = _direction(torch.where(inside, 1, x))
    return negative_radius_reported(torch.where(inside, x, r * direction), r, max_value, "projection_l2_ball", on_failure)


def projection_l2_sphere(x: Tensor, value: Number = 1.0, *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest point of {x : ‖x‖₂ = r}, which is not convex: r x / ‖x‖.

    At x = 0 every point is nearest: the one with equal entries is returned, with derivative zero in x.

    Args:
        x: ``(*batch, n)``, n ≥ 1.
        value: r, ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where r is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: r is negative somewhere (``on_failure="raise"``).

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_l2_sphere
        >>> projection_l2_sphere(torch.tensor([0.3, 0.4]), 2.0)
        tensor([1.2000, 1.6000])
    """
    check_rows(x, "x", at_least=1)
    r = radius(value, "value", x)
    zero = (x == 0).all(-1, keepdim=True)
    return negative_radius_reported(r * _direction(torch.where(zero, 1, x)), r, value, "projection_l2_sphere", on_failure)


def projection_hyperplane(x: Tensor, hyperparams: tuple[Tensor, Number], *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest point of {x : aᵀx = b}.

    Args:
        x: ``(*batch, n)``.
        hyperparams: (a, b), a ``(*batch, n)`` and b ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where a is zero and b is not.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: a is zero and b is not (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_hyperplane
        >>> projection_hyperplane(torch.tensor([1.0, 2.0]), (torch.ones(2), 1.0))
        tensor([0., 1.])
    """
    a, gap = _normal_and_gap(x, hyperparams)
    point, empty = _moved(x, a, gap, gap != 0)
    return failures_reported(point, empty, gap.abs().squeeze(-1), "projection_hyperplane", on_failure)


def projection_halfspace(x: Tensor, hyperparams: tuple[Tensor, Number], *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest point of {x : aᵀx ≤ b}. On the boundary the derivative is that of the inside.

    Args:
        x: ``(*batch, n)``.
        hyperparams: (a, b), a ``(*batch, n)`` and b ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where a is zero and b is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: a is zero and b is negative (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_halfspace
        >>> projection_halfspace(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), (torch.ones(2), 1.0))
        tensor([[0., 1.],
                [0., 0.]])
    """
    a, gap = _normal_and_gap(x, hyperparams)
    point, empty = _moved(x, a, torch.where(gap <= 0, 0, gap), gap > 0)
    return failures_reported(point, empty, gap.squeeze(-1), "projection_halfspace", on_failure)


def _clipped(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    # A comparison with NaN is false, and would let x pass.
    broken = torch.isnan(lower) | torch.isnan(upper)
    return torch.where(broken, torch.nan, torch.where(x < lower, lower, torch.where(x > upper, upper, x)))


def _direction(x: Tensor) -> Tensor:
    """x / ‖x‖ for x ≠ 0, without overflow of the squares."""
    # The direction does not depend on the scale, so that its derivative does not either.
    x = x / x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _normal_and_gap(x: Tensor, hyperparams: tuple[Tensor, Number]) -> tuple[Tensor, Tensor]:
    """The normal a, and aᵀx − b as ``(*batch, 1)``."""
    check_rows(x, "x")
    a, b = hyperparams
    a = check_parameter(a, "a", x, (x.shape[-1],))
    offset = check_parameter(b, "b", x, ()).unsqueeze(-1)
    try:
        torch.broadcast_shapes(x.shape[:-1], a.shape[:-1], offset.shape[:-1])
    except RuntimeError as error:
        shapes = f"x {tuple(x.shape)}, a {tuple(a.shape)}, b {tuple(offset.shape[:-1])}"
        raise ShapeError(f"batch dimensions do not broadcast: {shapes}") from error
    return a, (a * x).sum(-1, keepdim=True) - offset


def _moved(x: Tensor, a: Tensor, step: Tensor, violated: Tensor) -> tuple[Tensor, Tensor]:
    """The point x − step a / aᵀa, and where that is impossible since a is zero."""
    square = (a * a).sum(-1, keepdim=True)
    zero = square == 0
    point = x - torch.where(zero, 0, step) / torch.where(zero, 1, square) * a
    return point, (zero & violated).squeeze(-1)
