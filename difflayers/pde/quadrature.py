r"""Weights of an integral over a mesh: the rows of a conservation law.

.. math:: \int u \, dx \approx \sum_i w_i u_i, \qquad \text{trapezoid: } w_i = \tfrac12 (x_{i+1} - x_{i-1}), \qquad
          \text{Riemann: } w_i = x_i - x_{i-1} \text{ (right end) or } x_{i+1} - x_i \text{ (left end)},

where a neighbour beyond an end is that end itself. On a product of meshes the weights multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from ..errors import ShapeError

__all__ = ["riemann_weights", "trapezoid_weights"]


def trapezoid_weights(*coordinates: Tensor) -> Tensor:
    """The weights of the trapezoidal rule, of second order; exact for functions that are linear between the points.

    Args:
        *coordinates: for each dimension of the grid its points ``(n_i,)``, increasing, with any distances.

    Returns:
        ``(n_1, n_2, …)``. Differentiable in the coordinates.

    Raises:
        ShapeError: coordinates are not vectors of at least two points.

    Example:
        >>> import torch
        >>> from difflayers.pde import trapezoid_weights
        >>> trapezoid_weights(torch.tensor([0.0, 1.0, 2.0, 4.0]))
        tensor([0.5000, 1.0000, 1.5000, 1.0000])
    """
    return _product(coordinates, lambda step: (_with_zero(step, left=True) + _with_zero(step, left=False)) / 2)


def riemann_weights(*coordinates: Tensor, side: Literal["left", "right"] = "right") -> Tensor:
    """The weights of a Riemann sum, of first order: each cell counts with the value at one of its ends.

    Args:
        *coordinates: for each dimension of the grid its points ``(n_i,)``, increasing, with any distances.
        side: which end; the point at the other end of the grid has the weight zero.

    Returns:
        ``(n_1, n_2, …)``. Differentiable in the coordinates.

    Raises:
        ShapeError: coordinates are not vectors of at least two points.

    Example:
        >>> import torch
        >>> from difflayers.pde import riemann_weights
        >>> riemann_weights(torch.tensor([0.0, 1.0, 2.0, 4.0]))
        tensor([0., 1., 1., 2.])
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is not known; choose 'left' or 'right'")
    return _product(coordinates, lambda step: _with_zero(step, left=side == "right"))


def _with_zero(step: Tensor, *, left: bool) -> Tensor:
    zero = torch.zeros_like(step[:1])
    return torch.cat([zero, step] if left else [step, zero])


def _product(coordinates: tuple[Tensor, ...], rule: Callable[[Tensor], Tensor]) -> Tensor:
    for x in coordinates:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 1 or len(x) < 2:
            came = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(f"coordinates must be floating vectors of at least two points, one for each dimension, got {came}")
    if not coordinates:
        raise ShapeError("give the coordinates of the points, one vector for each dimension of the grid")
    return reduce(lambda rows, weights: rows.unsqueeze(-1) * weights, [rule(x.diff()) for x in coordinates])
