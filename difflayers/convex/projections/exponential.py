r"""Projection on the exponential cone, by one scalar equation.

.. math:: K = \operatorname{cl} \{(x, y, z) : y > 0,\; y e^{x/y} \le z\}.

A point (r, s, t) splits into its projections on K and on the polar cone. Outside of both, these lie on the rays

.. math:: a(ρ)\,(ρ, 1, e^ρ) \quad\text{and}\quad b(ρ)\,(1, 1 - ρ, -e^{-ρ}), \qquad
   a = \frac{(ρ - 1) r + s}{ρ^2 - ρ + 1}, \quad b = \frac{r - ρ s}{ρ^2 - ρ + 1},

where ρ is the only root of :math:`e^ρ a - e^{-ρ} b = t` with a, b > 0. The left side increases between the root of a and that of b.
The equation is multiplied by :math:`e^{-|ρ|}(ρ^2 - ρ + 1)`, and the point is rebuilt in two ways for the two signs of ρ, so that
nothing overflows and nothing cancels: :math:`z = t + e^{-ρ} b,\; y = e^{-ρ} z,\; x = ρ y` for ρ ≥ 0, and
:math:`y = a,\; z = e^ρ a,\; x = r - e^ρ (z - t)` below. Where |ρ| would exceed 700, K is its face (x ≤ 0, y ≥ 0, z ≥ 0) in floating point.

Reference: Friberg, Projection onto the exponential cone: a univariate root-finding problem, Optimization Methods and
Software 38 (2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...implicit.eager import eager
from .arguments import check_rows
from .scalar_root import Equation, scalar_root

__all__ = ["projection_exponential_cone"]

# e to the minus of it is below the rounding of anything, and e to it does not overflow.
_STEEPEST = 700.0


@eager
def projection_exponential_cone(x: Tensor) -> Tensor:
    """The nearest point of cl{(x, y, z) : y > 0, y exp(x / y) ≤ z}.

    Exact to rounding: a bracketed Newton method for the one root, in float64. On the boundary of the cone the derivative is that of
    the inside (the identity), on the boundary of the polar cone it is zero.

    Args:
        x: ``(*batch, 3)``, rows (x, y, z).

    Returns:
        ``(*batch, 3)``. A row that is not finite gives NaN.

    Raises:
        ShapeError: x is not a floating tensor of rows of three.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_exponential_cone
        >>> point = projection_exponential_cone(torch.tensor([1.0, 1.0, 1.0]))
        >>> point
        tensor([0.6123, 1.1124, 1.9289])
        >>> point[1] * torch.exp(point[0] / point[1])
        tensor(1.9289)
    """
    check_rows(x, "x", size=3)
    r, s, t = x.to(torch.float64).split(1, -1)
    finite = torch.isfinite(x).all(-1, keepdim=True)
    inside = (s > 0) & (s * torch.exp(r / torch.where(s > 0, s, 1)) <= t)
    polar = (r > 0) & (r * torch.exp(s / torch.where(r > 0, r, 1) - 1) <= -t)
    flat = torch.where(r <= 0, _STEEPEST * s <= -r, s < -_STEEPEST * r)
    curved = finite & ~(inside | polar | flat)
    # Elsewhere a point whose root is at ρ = 0 takes the place of the row.
    safe = [torch.where(curved, part, value) for part, value in ((r, 1.0), (s, 3.0), (t, 1.0))]
    on_curve = _rebuild(scalar_root(_EQUATION, *safe), *safe)
    face = torch.cat([torch.where(r <= 0, r, 0), torch.where(s >= 0, s, 0), torch.where(t >= 0, t, 0)], -1)
    point = torch.where(inside, torch.cat([r, s, t], -1), torch.where(polar, 0, torch.where(flat, face, on_curve)))
    return torch.where(finite, point, torch.nan).to(x.dtype)


def _residual(rho: Tensor, r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    upper = rho >= 0
    decay = torch.exp(torch.where(upper, -rho, rho))
    a, b = (rho - 1) * r + s, r - rho * s
    return torch.where(upper, a - decay * decay * b, decay * decay * a - b) - t * decay * (rho * rho - rho + 1)


def _newton(rho: Tensor, r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    upper = rho >= 0
    decay = torch.exp(-rho.abs())
    square = decay * decay
    weight = rho * rho - rho + 1
    a, b = (rho - 1) * r + s, r - rho * s
    above = r + square * (2 * b + s) + t * decay * (weight - 2 * rho + 1)
    below = s + square * (2 * a + r) - t * decay * (weight + 2 * rho - 1)
    a, b = (rho - 1).abs() * r.abs() + s.abs(), r.abs() + rho.abs() * s.abs()
    size = torch.where(upper, a + square * b, b + square * a) + t.abs() * decay * weight
    return torch.where(upper, above, below), size


def _bracket(r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Between the root of a and that of b, where both are positive."""
    limit = _STEEPEST + 100
    lower = torch.where(r > 0, 1 - s / torch.where(r > 0, r, 1), -limit)
    upper = torch.where(s > 0, r / torch.where(s > 0, s, 1), limit)
    return lower.clamp(-limit, limit), upper.clamp(-limit, limit)


_EQUATION = Equation(_residual, _newton, _bracket)


def _rebuild(rho: Tensor, r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    upper = rho >= 0
    decay = torch.exp(torch.where(upper, -rho, rho))
    weight = rho * rho - rho + 1
    a, b = ((rho - 1) * r + s) / weight, (r - rho * s) / weight
    z = torch.where(upper, t + decay * b, decay * a)
    y = torch.where(upper, decay * z, a)
    x = torch.where(upper, rho * y, r - decay * (z - t))
    return torch.cat([x, y, z], -1)
