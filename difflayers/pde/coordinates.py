r"""Derivatives of a network in its coordinates, forward: one Jacobian-vector product inside another.

.. math:: \frac{\partial^{m} f}{\partial x_{i_1} \cdots \partial x_{i_m}}(x)
   = \partial_{e_{i_m}} \bigl( \cdots \partial_{e_{i_1}} f \bigr)(x).

A product carries f and its lower derivatives along, so u, u_x and u_xx come out of one pass. Partial derivatives commute: paths are sorted,
the longest are taken first, and what has come out of them is not computed again. A pass of order m costs about 2ᵐ evaluations,
whatever the number of outputs; reverse mode then goes through it like through any other function.

Reference: Griewank and Walther, Evaluating Derivatives, 2nd edition, SIAM (2008), chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from ..errors import ShapeError

__all__ = ["coordinate_derivatives"]

_Path = tuple[int, ...]


def coordinate_derivatives(
    function: Callable[[Tensor], Tensor], coordinates: Tensor, orders: Mapping[Any, Sequence[int]] | Sequence[Sequence[int]]
) -> dict[Any, Tensor]:
    """Partial derivatives of a function of coordinates, at many points at once.

    Differentiable in the parameters of the function (train a network on them) and in the coordinates. With a network of N outputs, the
    derivatives of N basis functions.

    Args:
        function: ``(*batch, d) -> (*batch, ...)``, a network or anything that forward mode goes through. The value at a point must depend
            on the coordinates of this point only (no normalization over the batch).
        coordinates: ``(*batch, d)``, floating.
        orders: which derivatives: each a sequence of the coordinates to differentiate by, ``(1, 1)`` for the second derivative in the
            coordinate 1, ``()`` for the function itself. In a mapping they have names.

    Returns:
        a dict of the derivatives, each of the shape of the function's value. Its keys are those of the mapping, or the sequences as tuples.

    Raises:
        ShapeError: the coordinates are not floating, or have no such coordinate.

    Example:
        >>> import torch
        >>> from difflayers.pde import coordinate_derivatives
        >>> def wave(tx):
        ...     return torch.sin(tx[..., 1] - 2 * tx[..., 0])
        >>> d = coordinate_derivatives(wave, torch.zeros(1, 2), {"u": (), "u_t": (0,), "u_x": (1,), "u_xx": (1, 1)})
        >>> d["u_t"], d["u_x"]
        (tensor([-2.]), tensor([1.]))
    """
    if not isinstance(coordinates, Tensor) or not coordinates.is_floating_point() or coordinates.dim() < 1:
        came = f"{coordinates.dtype}, {tuple(coordinates.shape)}" if isinstance(coordinates, Tensor) else type(coordinates).__name__
        raise ShapeError(f"coordinates must be a floating tensor (*batch, d), got {came}")
    count = coordinates.shape[-1]
    named = dict(orders) if isinstance(orders, Mapping) else {tuple(path): path for path in orders}
    paths = {key: tuple(sorted(path)) for key, path in named.items()}
    for path in paths.values():
        if any(not 0 <= i < count for i in path):
            raise ShapeError(f"the points have the coordinates 0 to {count - 1}, and a derivative by {path} is asked for")
    found: dict[_Path, Tensor] = {}
    for path in sorted(paths.values(), key=len, reverse=True):
        if path not in found:
            values = _evaluate(_along(function, path), coordinates)
            found.update((path[:length], value) for length, value in enumerate(values))
    return {key: found[path] for key, path in paths.items()}


def _evaluate(derivatives: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    try:
        return derivatives(x)
    except NotImplementedError:
        if torch.is_grad_enabled():
            raise
        # Under no_grad the slopes of some activations (SiLU, for one) are operations without a forward mode of their own.
        with torch.enable_grad():
            return tuple(value.detach() for value in derivatives(x))


def _along(function: Callable[[Tensor], Tensor], path: _Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The function and its derivatives by the first, the first two, … coordinates of the path."""
    if not path:
        return lambda x: (function(x),)
    lower = _along(function, path[:-1])

    def derivatives(x: Tensor) -> tuple[Tensor, ...]:
        direction = torch.zeros_like(x)
        direction[..., path[-1]] = 1
        values, slopes = jvp(lower, (x,), (direction,))[:2]
        return (*values, slopes[-1])

    return derivatives
