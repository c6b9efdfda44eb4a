"""What a derivative on a mesh asks of its arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ShapeError

__all__ = ["check_values"]


def check_values(u: Any, dim: int, order: int) -> int:
    """Refuse what is not values on a mesh, or not an order.

    Args:
        u: the values.
        dim: the dimension that is asked for.
        order: of the derivative.

    Returns:
        the dimension counted from the front.

    Raises:
        ShapeError: u is not floating, or has no such dimension.
        ValueError: the order is less than 1.
    """
    if not isinstance(u, Tensor) or not u.is_floating_point():
        raise ShapeError(f"u must be a floating tensor, got {u.dtype if isinstance(u, Tensor) else type(u).__name__}")
    if not -u.dim() <= dim < u.dim():
        raise ShapeError(f"u has no dimension {dim}: its shape is {tuple(u.shape)}")
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    return dim % u.dim()
