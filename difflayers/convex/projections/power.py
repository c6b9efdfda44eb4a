r"""Projection on the three-dimensional power cone, by one scalar equation.

.. math:: K_α = \{(x, y, z) : x^α y^{1-α} \ge |z|,\; x, y \ge 0\}, \qquad 0 < α < 1.

With the point (x₀, y₀, z₀) divided by |z₀| to (X, Y, ±1), the projection outside of the cone and its polar is

.. math:: x = \tfrac12 \bigl(X + \sqrt{X^2 + 4 α q}\bigr), \quad y = \tfrac12 \bigl(Y + \sqrt{Y^2 + 4 (1 - α) q}\bigr), \quad
   z = \pm s, \qquad q = s (1 - s),

times |z₀|, where s in (0, 1) is the only root of :math:`α \log x + (1 - α) \log y = \log s`. The unknown is u with
:math:`s = 1 / (1 + e^{-u})`, so that s and 1 − s are exact near both of their ends. For X < 0 the root is written as
:math:`x = 2 α q / (\sqrt{\cdot} - X)`, and the logarithm of q joins that of s, so that nothing cancels.

Reference: Hien, Differential properties of Euclidean projection onto power cone, Mathematical Methods of Operations
Research 82 (2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError
from ...implicit.eager import eager
from .arguments import check_rows
from .scalar_root import Equation, scalar_root

__all__ = ["projection_power_cone"]

# Beyond this |u| the share s is 0 or 1 in every digit.
_WIDEST = 600.0
# A smaller |z| is zero beside x and y.
_NEGLIGIBLE = 1e-100


@eager
def projection_power_cone(x: Tensor, alpha: Tensor | float = 0.5) -> Tensor:
    """The nearest point of the cone ``{(x, y, z) : x^α y^(1−α) ≥ |z|, x, y ≥ 0}``.

    Exact to rounding: a bracketed Newton method for the one root, in float64. Differentiable in the point and in α. On the
    boundary of the cone the derivative is that of the inside (the identity), on the boundary of the polar cone it is zero.

    Args:
        x: ``(*batch, 3)``, rows (x, y, z).
        alpha: ``(*batch,)`` or a number, between 0 and 1; one without batch dimensions is shared.

    Returns:
        ``(*batch, 3)``. A row that is not finite, or whose α is not between 0 and 1, gives NaN.

    Raises:
        ShapeError: x is not a floating tensor of rows of three, or α does not fit its batch.
        ValueError: α is a number and not between 0 and 1.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_power_cone
        >>> projection_power_cone(torch.tensor([0.0, 0.0, 2.0]), 0.5)
        tensor([0.6667, 0.6667, 0.6667])
    """
    check_rows(x, "x", size=3)
    if not isinstance(alpha, Tensor):
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        alpha = torch.full((), alpha, dtype=torch.float64, device=x.device)
    weight = alpha.to(torch.float64).unsqueeze(-1)
    try:
        x0, y0, z0, weight = torch.broadcast_tensors(*x.to(torch.float64).split(1, -1), weight)
    except RuntimeError as error:
        raise ShapeError(f"alpha must have the shape (*batch,) of x, got {tuple(alpha.shape)} and {tuple(x.shape)}") from error
    finite = torch.isfinite(x).all(-1, keepdim=True) & (weight > 0) & (weight < 1)
    weight = torch.where(finite, weight, 0.5)

    largest = torch.maximum(x0.abs(), y0.abs())
    size = torch.where(z0 < 0, -z0, z0)
    mean = x0.clamp(min=0) ** weight * y0.clamp(min=0) ** (1 - weight)
    dual = (-x0 / weight).clamp(min=0) ** weight * (-y0 / (1 - weight)).clamp(min=0) ** (1 - weight)
    inside = (x0 >= 0) & (y0 >= 0) & (mean >= size)
    polar = (x0 <= 0) & (y0 <= 0) & (dual >= size) & ~inside
    curved = finite & ~(inside | polar)
    # The share s tends to a limit as z goes to zero, and is found there for any smaller z.
    size = torch.where(size > _NEGLIGIBLE * largest, size, _NEGLIGIBLE * largest.detach())
    size = torch.where(curved, size, 1)
    X, Y = (torch.where(curved, part, 0) / size for part in (x0, y0))

    end = torch.full_like(size, _WIDEST)
    none, whole = _residual(-end, X, Y, weight) >= 0, _residual(end, X, Y, weight) <= 0
    flat = curved & (none | whole)
    X, Y = (torch.where(flat, 0, part) for part in (X, Y))
    x_safe, y_safe = (torch.where(curved & ~flat, part, 1) for part in (x0, y0))
    u = scalar_root(_EQUATION, X, Y, weight)
    share, rest = torch.sigmoid(u), torch.sigmoid(-u)
    # Not size · x(X), whose derivative in size would cancel: the same root in the scale of the point.
    q = size * size * share * rest
    on_curve = torch.cat([_root(x_safe, weight, q), _root(y_safe, 1 - weight, q), z0 * share], -1)
    positive = [torch.where(part >= 0, part, 0) for part in (x0, y0)]
    face = torch.cat([*positive, torch.where(whole, z0, 0)], -1)
    point = torch.where(inside, torch.cat([x0, y0, z0], -1), torch.where(polar, 0, torch.where(flat, face, on_curve)))
    return torch.where(finite, point, torch.nan).to(x.dtype)


def _residual(u: Tensor, X: Tensor, Y: Tensor, weight: Tensor) -> Tensor:
    """log s − α log x − (1 − α) log y, with the logarithms of q = s (1 − s) taken out of x and y where they are negative."""
    share = torch.sigmoid(u) * torch.sigmoid(-u)
    kept, taken = _weights(X < 0, Y < 0, weight)
    logs = weight * _log_root(X, weight, share) + (1 - weight) * _log_root(Y, 1 - weight, share)
    return kept * _log_sigmoid(u) - taken * _log_sigmoid(-u) - logs


def _weights(x_is_negative: Tensor, y_is_negative: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weights that log s keeps, and that log(1 − s) takes over; each is exactly 0 if the other one is 1."""
    kept = torch.where(x_is_negative, torch.where(y_is_negative, 0, 1 - weight), torch.where(y_is_negative, weight, 1))
    taken = torch.where(x_is_negative, torch.where(y_is_negative, 1, weight), torch.where(y_is_negative, 1 - weight, 0))
    return kept, taken


def _log_sigmoid(u: Tensor) -> Tensor:
    # The backward of torch.nn.functional.logsigmoid mistakes the shape of a cotangent that vmap batches (torch 2.13).
    negative = u < 0
    return torch.where(negative, u, 0) - torch.log1p(torch.exp(torch.where(negative, u, -u)))


def _newton(u: Tensor, X: Tensor, Y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    share, rest = torch.sigmoid(u), torch.sigmoid(-u)
    q = share * rest
    slope, size = 0, 1 + u.abs()
    for part, power in ((X, weight), (Y, 1 - weight)):
        root = torch.sqrt(part * part + 4 * power * q)
        total = part.abs() + root
        rate = 2 * power * power / (root * total) * q * (rest - share)
        slope = slope + torch.where(part < 0, rate, -rate)
        size = size + power * torch.log(total).abs()
    kept, taken = _weights(X < 0, Y < 0, weight)
    return slope + kept * rest + taken * share, size


def _bracket(X: Tensor, Y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    end = torch.full_like(X, _WIDEST)
    return -end, end


_EQUATION = Equation(_residual, _newton, _bracket)


def _sum(X: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    """|X| + √(X² + 4 α q)."""
    return torch.where(X < 0, -X, X) + torch.sqrt(X * X + 4 * weight * q)


def _root(X: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    total = _sum(X, weight, q)
    return torch.where(X < 0, 2 * weight * q / total, total / 2)


def _log_root(X: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    """The logarithm of :func:`_root`, without that of q where X is negative."""
    total = _sum(X, weight, q)
    return torch.log(torch.where(X < 0, 2 * weight / total, total / 2))
