"""What the functions on one dimension of a tensor ask of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..convex.projections.arguments import check_parameter, check_rows
from ..errors import ShapeError

__all__ = ["Strength", "check_choice", "rows_and_strength"]

Strength = Tensor | float


def check_choice(value: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that is not known.

    Args:
        value: what came.
        name: what the message calls it.
        known: what may come.

    Raises:
        ValueError: with those that are.
    """
    if value not in known:
        raise ValueError(f"{name} {value!r} is not known; choose one of {', '.join(known)}")


def rows_and_strength(x: Tensor, strength: Strength, dim: int) -> tuple[Tensor, Tensor | float, torch.dtype]:
    """x in float64 with ``dim`` last, the strength as a float or as ``(*batch, 1)``, NaN where it is not positive, and the dtype of x.

    Args:
        x: a floating tensor.
        strength: a number, or a tensor ``(*batch,)``.
        dim: a dimension of x.

    Raises:
        ShapeError: what came does not fit.
        ValueError: the strength is a number that is not positive.
    """
    check_rows(x, "x")
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(f"dim {dim} is not a dimension of x, whose shape is {tuple(x.shape)}")
    rows = x.movedim(dim, -1)
    if not isinstance(strength, Tensor):
        if not 0 < strength < float("inf"):
            raise ValueError(f"regularization_strength must be a positive number, got {strength}; to sort without one, use torch.sort")
        return rows.double(), float(strength), x.dtype
    each = check_parameter(strength, "regularization_strength", x, ())
    try:
        batch = torch.broadcast_shapes(each.shape, rows.shape[:-1])
    except RuntimeError as error:
        raise ShapeError(
            f"regularization_strength must have the shape {tuple(rows.shape[:-1])} of x without dim {dim}, got {tuple(each.shape)}"
        ) from error
    each = torch.where(each > 0, each, torch.nan).unsqueeze(-1).double()
    return rows.expand(*batch, rows.shape[-1]).double(), each, x.dtype
