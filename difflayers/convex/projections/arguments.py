"""What the projections ask of their arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import ShapeError

__all__ = ["check_rows"]


def check_rows(x: Any, name: str, *, size: int | None = None, at_least: int = 0) -> None:
    """Refuse what is not a floating tensor of rows ``(*batch, n)``.

    Args:
        x: the argument.
        name: what the message calls it.
        size: the n that is wanted.
        at_least: the least n that is wanted.

    Raises:
        ShapeError: with what came.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ShapeError(f"{name} must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    wanted = f"(*batch, {'n' if size is None else size})"
    if x.dim() < 1 or (size is not None and x.shape[-1] != size):
        raise ShapeError(f"{name} must have the shape {wanted}, got {tuple(x.shape)}")
    if x.shape[-1] < at_least:
        raise ShapeError(f"{name} must have the shape {wanted} with n of at least {at_least}, got {tuple(x.shape)}")
