r"""Derivatives of a network in its coordinates: one first derivative inside another.

.. math:: \frac{\partial^{m} f}{\partial x_{i_1} \cdots \partial x_{i_m}}(x)
   = \partial_{i_m} \bigl( \cdots \partial_{i_1} f \bigr)(x).

Each :math:`\partial_i` is a Jacobian-vector product with the unit vector :math:`e_i`, at a cost that does not grow with the number of
outputs; or, for a function of one output, the entry i of a vector-Jacobian product. A pass carries the lower derivatives along, so u,
u_x and u_xx come out of one. Partial derivatives commute: paths are sorted, the longest are taken first, and what has come out of them
is not computed again. A pass of order m costs about 2ᵐ evaluations.

Reference: Griewank and Walther, Evaluating Derivatives, 2nd edition, SIAM (2008), chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp, vjp

from ..errors import ShapeError

__all__ = ["coordinate_derivatives"]

_Path = tuple[int, ...]
_Carrying = Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]


def coordinate_derivatives(
    function: Callable[[Tensor], Tensor],
    coordinates: Tensor,
    orders: Mapping[Any, Sequence[int]] | Sequence[Sequence[int]],
    *,
    mode: Literal["forward", "reverse"] = "forward",
) -> dict[Any, Tensor]:
    """Partial derivatives of a function of coordinates, at many points at once.

    Differentiable in the parameters of the function (train a network on them) and in the coordinates. With a network of N outputs, the
    derivatives of N basis functions.

    Args:
        function: ``(*batch, d) -> (*batch, ...)``, a network or anything that forward mode goes through. The value at a point must depend
            on the coordinates of this point only (no normalization over the batch), and be the same at every call (no dropout).
        coordinates: ``(*batch, d)``, floating.
        orders: which derivatives: each a sequence of the coordinates to differentiate by, ``(1, 1)`` for the second derivative in the
            coordinate 1, ``()`` for the function itself. In a mapping they have names.
        mode: ``"forward"`` for any number of outputs; ``"reverse"`` is faster where the function has one output a point, and takes
            no others.

    Returns:
        a dict of the derivatives, each of the shape of the function's value. Its keys are those of the mapping, or the sequences as tuples.

    Raises:
        ShapeError: the coordinates are not floating, or have no such coordinate; in reverse mode, the function has several outputs.
        ValueError: another mode.

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
    if mode not in ("forward", "reverse"):
        raise ValueError(f'mode must be "forward" or "reverse", got {mode!r}')
    slope = _forward_slope if mode == "forward" else _reverse_slope
    count = coordinates.shape[-1]
    named = dict(orders) if isinstance(orders, Mapping) else {tuple(path): path for path in orders}
    paths = {key: tuple(sorted(path)) for key, path in named.items()}
    for path in paths.values():
        if any(not 0 <= i < count for i in path):
            raise ShapeError(f"the points have the coordinates 0 to {count - 1}, and a derivative by {path} is asked for")
    found: dict[_Path, Tensor] = {}
    for path in sorted(paths.values(), key=len, reverse=True):
        if path not in found:
            values = _evaluate(_along(function, path, slope), coordinates)
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


def _along(function: Callable[[Tensor], Tensor], path: _Path, slope: Callable[..., Any]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The function and its derivatives by the first, the first two, … coordinates of the path."""
    if not path:
        return lambda x: (function(x),)
    lower = _along(function, path[:-1], slope)

    def highest(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        values = lower(x)
        return values[-1], values

    return partial(slope, highest, path[-1])


def _forward_slope(highest: _Carrying, i: int, x: Tensor) -> tuple[Tensor, ...]:
    direction = torch.zeros_like(x)
    direction[..., i] = 1
    pushed: Any = jvp(highest, (x,), (direction,), has_aux=True)
    _, slope, values = pushed
    return (*values, slope)


def _reverse_slope(highest: _Carrying, i: int, x: Tensor) -> tuple[Tensor, ...]:
    pulled: Any = vjp(highest, x, has_aux=True)
    value, pullback, values = pulled
    if value.numel() != x[..., 0].numel():
        raise ShapeError(f'mode="reverse" takes a function of one output a point; from {tuple(x.shape)} came {tuple(value.shape)}')
    # The points do not see each other, so one product serves them all.
    return (*values, pullback(torch.ones_like(value))[0][..., i].reshape(value.shape))
