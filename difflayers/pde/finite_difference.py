r"""Finite differences of any order and accuracy, on uniform and on arbitrary meshes, up to the edges.

The derivative of order m at the point x is that of the polynomial through the m + p points :math:`x + d_j` around it,

.. math:: u^{(m)}(x) = \sum_j w_j\, u(x + d_j) + O(h^p),

with the weights of :mod:`difflayers.pde.stencils`. The points lie around x, as centrally as they can (on a uniform mesh, for
even m, one of the weights is then zero); at an edge m + p points pushed inwards close the formula with the same accuracy. The weights of
a uniform mesh are computed in exact rational arithmetic, once. Those of any other mesh are ordinary tensors, one row for each point, and
may be differentiated in the coordinates. The formula is applied by slices: nothing of the size n × n is ever made.

Reference: Fornberg, Generation of finite difference formulas on arbitrarily spaced grids, Mathematics of Computation 51 (1988).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import ShapeError
from ..implicit.function import in_a_transform
from .mesh_arguments import check_values
from .stencils import finite_difference_weights, rounded_weights

__all__ = ["Boundary", "Side", "edge_derivative", "finite_difference"]

Boundary = Literal["one_sided", "periodic"]
Side = Literal["lower", "upper"]


def finite_difference(
    u: Tensor, spacing: Tensor | float, *, dim: int = -1, order: int = 1, accuracy: int = 2, boundary: Boundary = "one_sided"
) -> Tensor:
    """The derivative of a function given on a mesh, along one of its dimensions.

    Linear in u, and differentiable in the spacing or the coordinates, too. Mixed derivatives are two calls. The rounding error grows
    like the precision of u over the spacing to the power ``order``.

    Args:
        u: ``(..., n, ...)``, floating, with the mesh along ``dim`` and anything in the other dimensions.
        spacing: the distance of two neighbours, a number or a tensor without dimensions; or the coordinates of the points, ``(n,)``,
            strictly monotone. Coordinates are better given in float64, also where u is float32: their differences lose digits.
        dim: the dimension to differentiate along.
        order: of the derivative, at least 1.
        accuracy: the power of the spacing that the error goes with, even; at the edges, too.
        boundary: ``"one_sided"`` formulas at the edges, or ``"periodic"``: u goes on with its first value after its last (so the period
            is n times the spacing, which must be uniform).

    Returns:
        of the shape and dtype of u.

    Raises:
        ShapeError: u is not floating, or has too few points: it takes order + accuracy of them.
        ValueError: an option is out of range, or the coordinates are not strictly monotone (in a transform of torch.func, where values
            cannot be seen, the derivative is NaN).

    Example:
        >>> import torch
        >>> from difflayers.pde import finite_difference
        >>> x = torch.linspace(0, 1, 5)
        >>> finite_difference(x**2, 0.25)
        tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000])
    """
    n, dim = _check(u, spacing, dim, order, accuracy)
    if boundary not in ("one_sided", "periodic"):
        raise ValueError(f'boundary must be "one_sided" or "periodic", got {boundary!r}')
    points = order + accuracy
    if not isinstance(spacing, Tensor) or spacing.dim() == 0:
        reach = (points - 1) // 2
        if boundary == "periodic":
            _check_points(n, 2 * reach + 1, dim, u)
            u = torch.cat([u.narrow(dim, n - reach, reach), u, u.narrow(dim, 0, reach)], dim)
        else:
            _check_points(n, points, dim, u)
        scale = 1.0 if isinstance(spacing, Tensor) else float(spacing) ** -order
        inside = _apply_central([weight * scale for weight in rounded_weights(range(-reach, reach + 1), order)], u, dim)
        if boundary == "one_sided":
            lower, upper = (
                torch.tensor([rounded_weights(range(-i, points - i), order) for i in rows], dtype=u.dtype, device=u.device) * scale
                for rows in (range(reach), range(points - reach, points))
            )
            inside = _close(lower, inside, upper, u, dim)
        return inside / spacing**order if isinstance(spacing, Tensor) else inside
    if boundary == "periodic":
        raise ValueError('boundary="periodic" takes a spacing, a number or a tensor without dimensions, not the coordinates of the points')
    _check_points(n, points, dim, u)
    weights = _mesh_weights(spacing, points, order).to(u.dtype)
    before, after = points // 2, (points - 1) // 2
    inside = weights[before : n - after].reshape(-1, points, *[1] * (u.dim() - dim - 1)).unbind(1)
    return _close(weights[:before], _apply_central(inside, u, dim), weights[n - after :], u, dim)


def edge_derivative(u: Tensor, spacing: Tensor | float, *, dim: int, side: Side = "lower", order: int = 1, accuracy: int = 2) -> Tensor:
    """The derivative at one edge of a mesh: the first or the last of :func:`finite_difference` along ``dim``, and nothing else.

    It is taken in the direction of growing index or coordinate on both sides: the outward normal derivative at the lower edge is
    its negative.

    Args:
        u: ``(..., n, ...)``, floating.
        spacing: as in :func:`finite_difference`.
        dim: the dimension to differentiate along.
        side: ``"lower"`` is the first point, ``"upper"`` the last.
        order: of the derivative, at least 1.
        accuracy: the power of the spacing that the error goes with, even.

    Returns:
        the shape of u without ``dim``.

    Raises:
        ShapeError: as in :func:`finite_difference`.
        ValueError: as in :func:`finite_difference`.

    Example:
        >>> import torch
        >>> from difflayers.pde import edge_derivative
        >>> x = torch.linspace(0, 1, 5)
        >>> edge_derivative(x**2, 0.25, dim=0, side="upper")
        tensor(2.)
    """
    n, dim = _check(u, spacing, dim, order, accuracy)
    if side not in ("lower", "upper"):
        raise ValueError(f'side must be "lower" or "upper", got {side!r}')
    points = order + accuracy
    _check_points(n, points, dim, u)
    start = 0 if side == "lower" else n - points
    if isinstance(spacing, Tensor) and spacing.dim() == 1:
        broken = _check_monotone(spacing)
        x = spacing.narrow(0, start, points)
        weights = finite_difference_weights(x - (x[0] if side == "lower" else x[-1]), order)
        weights = torch.where(broken, torch.nan, weights).to(u.dtype)
    else:
        offsets = range(points) if side == "lower" else range(1 - points, 1)
        weights = torch.tensor(rounded_weights(offsets, order), dtype=u.dtype, device=u.device) / spacing**order
    return torch.tensordot(weights, u.narrow(dim, start, points), ([0], [dim]))


def _mesh_weights(x: Tensor, points: int, order: int) -> Tensor:
    """``(n, points)``: for each point of the mesh the weights of the ``points`` around it, or next to it at an edge."""
    broken = _check_monotone(x)
    n = x.shape[0]
    first = (torch.arange(n, device=x.device) - points // 2).clamp(0, n - points)
    windows = x[first.unsqueeze(-1) + torch.arange(points, device=x.device)]
    return torch.where(broken, torch.nan, finite_difference_weights(windows - x.unsqueeze(-1), order))


def _apply_central(weights: Sequence[float] | Sequence[Tensor], u: Tensor, dim: int) -> Tensor:
    """Σ_j w_j u[i + j] at every i where all the points are there; a weight may vary along ``dim``."""
    rows = u.shape[dim] - len(weights) + 1
    total = None
    for j, weight in enumerate(weights):
        if isinstance(weight, Tensor):
            part = u.narrow(dim, j, rows)
            total = part * weight if total is None else torch.addcmul(total, part, weight)
        elif weight:
            part = u.narrow(dim, j, rows)
            total = part * weight if total is None else total.add_(part, alpha=weight)
    assert total is not None
    return total


def _close(lower: Tensor, inside: Tensor, upper: Tensor, u: Tensor, dim: int) -> Tensor:
    """The derivatives inside, with those at the first and last points: matrices ``(rows, points)`` times the points next to the edge."""
    points = lower.shape[1]
    first = torch.tensordot(lower, u.narrow(dim, 0, points), ([1], [dim])).movedim(0, dim)
    last = torch.tensordot(upper, u.narrow(dim, u.shape[dim] - points, points), ([1], [dim])).movedim(0, dim)
    return torch.cat([first, inside, last], dim)


def _check(u: Tensor, spacing: Tensor | float, dim: int, order: int, accuracy: int) -> tuple[int, int]:
    """The number of points, and the dimension counted from the front."""
    dim = check_values(u, dim, order)
    if accuracy < 2 or accuracy % 2:
        raise ValueError(f"accuracy must be even and at least 2, got {accuracy}: try {max(2, accuracy + 1)}")
    n = u.shape[dim]
    if isinstance(spacing, Tensor):
        if not spacing.is_floating_point() or spacing.shape not in ((), (n,)):
            raise ShapeError(
                "spacing must be a number, a floating tensor without dimensions, or the coordinates of the points, "
                f"here ({n},); got {spacing.dtype} of the shape {tuple(spacing.shape)}"
            )
        if spacing.dim() and spacing.device != u.device:
            raise ShapeError(f"the coordinates are on {spacing.device}, and u on {u.device}; move one of them")
    elif not (spacing > 0 and math.isfinite(spacing)):
        raise ValueError(f"spacing must be positive and finite, got {spacing}")
    return n, dim


def _check_points(n: int, wanted: int, dim: int, u: Tensor) -> None:
    if n < wanted:
        raise ShapeError(
            f"the formula takes {wanted} points, and u of the shape {tuple(u.shape)} has {n} along dimension {dim}: "
            "use a finer mesh, or a lower order or accuracy"
        )


def _check_monotone(x: Tensor) -> Tensor:
    """Whether the coordinates are not strictly monotone, where that cannot be seen; an error where it can."""
    steps = x.detach().diff()
    broken = ~((steps > 0).all() | (steps < 0).all())
    if not in_a_transform(x) and not torch.compiler.is_compiling() and bool(broken):
        raise ValueError("the coordinates must be strictly monotone; sort them, and u with them")
    return broken
