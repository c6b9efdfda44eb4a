r"""Norms and their squares: proximal operators that are a formula.

.. math::
   λ\|x\|_2 &: \; \max(1 - λ/\|x\|, 0)\, x, &
   \tfrac{λ}{2}\|x\|_2^2 &: \; x / (1 + λ), &
   λ\|x\|_\infty &: \; x - Π_{\|\cdot\|_1 \le λ}(x), \\
   λ_1\|x\|_1 + \tfrac{λ_2}{2}\|x\|_2^2 &: \; S_{λ_1}(x) / (1 + λ_2), &
   λ \textstyle\sum h_δ(x_i) &: \; x - λ \operatorname{clip}(x / (1 + λ), -δ, δ), \quad
   h_δ(u) = \begin{cases} u^2/2 & |u| \le δ \\ δ|u| - δ^2/2 & \text{else} \end{cases}

The one of the maximum norm is Moreau's identity. All are differentiated by autograd; at a kink the derivative is that of one side:
of the outside for ‖x‖₂, of the inside for ‖x‖₁ and ‖x‖∞, of the quadratic for Huber's function.

References: Parikh and Boyd, Proximal algorithms, Foundations and Trends in Optimization 1 (2014), chapter 6; Zou and
Hastie, Regularization and variable selection via the elastic net, JRSS B 67 (2005).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...convex.projections import projection_l1_ball
from ...convex.projections.arguments import check_rows
from ...solution import OnFailure
from .arguments import Number, check_entries, check_entry_weight, entry_weight, negative, row_weight, weights_reported
from .thresholds import shrunk

__all__ = ["norm_and_direction", "prox_elastic_net", "prox_huber", "prox_l2", "prox_linf", "prox_squared_l2"]


def prox_l2(x: Tensor, lam: Number, *, on_failure: OnFailure = "raise") -> Tensor:
    """The proximal operator of λ‖x‖₂ (not squared), the block soft threshold: the row gets shorter by λ, and zero if it is shorter.

    Args:
        x: ``(*batch, n)``.
        lam: λ ≥ 0, ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        NotConvergedError: λ is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_l2
        >>> prox_l2(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """
    check_rows(x, "x")
    shrink = row_weight(lam, "lam", x)
    norm, direction = norm_and_direction(x)
    point = torch.where(norm.detach() < shrink, 0, x - shrink * direction)
    return weights_reported(point, negative(lam), "prox_l2", on_failure, core_ndim=1)


def prox_squared_l2(x: Tensor, lam: Number, *, on_failure: OnFailure = "raise") -> Tensor:
    """The proximal operator of ½λ‖x‖₂²: x / (1 + λ).

    Args:
        x: any shape.
        lam: λ ≥ 0, a number or a tensor that broadcasts against x.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ is negative.

    Returns:
        The shape of x and λ broadcast.

    Raises:
        NotConvergedError: λ is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_squared_l2
        >>> prox_squared_l2(torch.tensor([-2.0, 3.0]), 1.0)
        tensor([-1.0000,  1.5000])
    """
    check_entries(x)
    point = x / (1 + entry_weight(lam, "lam", x))
    return weights_reported(point, negative(lam), "prox_squared_l2", on_failure, core_ndim=0)


def prox_linf(x: Tensor, lam: Number, *, on_failure: OnFailure = "raise") -> Tensor:
    """The proximal operator of λ‖x‖∞: the largest entries are brought down to one level, by λ together.

    Args:
        x: ``(*batch, n)``, n ≥ 1.
        lam: λ ≥ 0, ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        NotConvergedError: λ is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_linf
        >>> prox_linf(torch.tensor([3.0, -2.5, 1.0]), 1.0)
        tensor([ 2.2500, -2.2500,  1.0000])
    """
    check_rows(x, "x", at_least=1)
    row_weight(lam, "lam", x)
    point = x - projection_l1_ball(x, lam, on_failure="nan")
    return weights_reported(point, negative(lam), "prox_linf", on_failure, core_ndim=1)


def prox_elastic_net(x: Tensor, lam1: Number, lam2: Number, *, on_failure: OnFailure = "raise") -> Tensor:
    """The proximal operator of λ₁‖x‖₁ + ½λ₂‖x‖₂².

    Args:
        x: any shape.
        lam1: λ₁ ≥ 0, a number or a tensor that broadcasts against x.
        lam2: λ₂ ≥ 0, likewise.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where a weight is negative.

    Returns:
        The shape of x, λ₁ and λ₂ broadcast.

    Raises:
        NotConvergedError: a weight is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_elastic_net
        >>> prox_elastic_net(torch.tensor([-2.0, 0.3, 1.5]), 0.5, 1.0)
        tensor([-0.7500,  0.0000,  0.5000])
    """
    check_entries(x)
    check_entry_weight(lam1, "lam1", x)
    point = shrunk(x, lam1) / (1 + entry_weight(lam2, "lam2", x))
    rule = "lam1 and lam2 must not be negative"
    return weights_reported(point, negative(lam1, lam2), "prox_elastic_net", on_failure, core_ndim=0, rule=rule)


def prox_huber(x: Tensor, lam: Number, delta: Number = 1.0, *, on_failure: OnFailure = "raise") -> Tensor:
    """The proximal operator of λ Σ h_δ(xᵢ), Huber's function: quadratic up to δ, and linear from there on.

    Args:
        x: any shape.
        lam: λ ≥ 0, a number or a tensor that broadcasts against x.
        delta: δ ≥ 0, likewise.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ or δ is negative.

    Returns:
        The shape of x, λ and δ broadcast.

    Raises:
        NotConvergedError: λ or δ is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_huber
        >>> prox_huber(torch.tensor([-2.0, 0.5, 4.0]), 1.0)
        tensor([-1.0000,  0.2500,  3.0000])
    """
    check_entries(x)
    weight, bend = entry_weight(lam, "lam", x), entry_weight(delta, "delta", x)
    point = x - weight * torch.clamp(x / (1 + weight), -bend, bend)
    rule = "lam and delta must not be negative"
    return weights_reported(point, negative(lam, delta), "prox_huber", on_failure, core_ndim=0, rule=rule)


def norm_and_direction(x: Tensor) -> tuple[Tensor, Tensor]:
    """‖x‖ ``(*batch, 1)`` and x / ‖x‖; zero, with derivative zero, where x is zero.

    Args:
        x: ``(*batch, n)``.
    """
    # The direction does not depend on the scale, so that its derivative does not either, and no square overflows.
    scale = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(*x.shape[:-1], 1)
    zero = scale == 0
    unit = torch.where(zero, 1, x / torch.where(zero, 1, scale))
    length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    return torch.where(zero, 0, scale * length), torch.where(zero, 0, unit / length)
