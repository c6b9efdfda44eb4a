"""What the ranking losses and metrics ask of their arguments, and how losses are reduced."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ShapeError
from .arguments import check_choice

__all__ = ["Reduction", "check_count", "check_mask", "check_rows", "floating", "reduced"]

Reduction = Literal["mean", "sum", "none"]


def check_rows(x: Any, name: str, like: Tensor | None = None, what: str = "") -> None:
    """Refuse what is not a tensor of rows ``(*batch, n)`` of real numbers, n ≥ 1, or not of the shape of another one.

    Args:
        x: the argument.
        name: what the message calls it.
        like: the tensor whose shape is wanted.
        what: what the message calls that one.

    Raises:
        ShapeError: with what came.
    """
    if not isinstance(x, Tensor) or x.is_complex():
        raise ShapeError(f"{name} must be a tensor of real numbers, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if like is not None and x.shape != like.shape:
        raise ShapeError(f"{name} must have the shape of {what}, {tuple(like.shape)}, got {tuple(x.shape)}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ShapeError(f"{name} must have the shape (*batch, n) with n of at least 1, got {tuple(x.shape)}")


def check_mask(mask: Any, x: Tensor, name: str) -> None:
    """Refuse a mask that is not None and not bool of the shape of x.

    Args:
        mask: the argument.
        x: what it masks.
        name: what the message calls x.

    Raises:
        ShapeError: with what came.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(f"mask must be a bool tensor, True where an item counts, got {came}")
    if mask.shape != x.shape:
        raise ShapeError(f"mask must have the shape of {name}, {tuple(x.shape)}, got {tuple(mask.shape)}")


def check_count(k: Any, limit: int | None = None) -> None:
    """Refuse a k that is not an integer from 1 to the limit.

    Args:
        k: the argument.
        limit: the largest k; None for any.

    Raises:
        ValueError: with what came.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1 or (limit is not None and k > limit):
        raise ValueError(f"k must be an integer of at least 1{'' if limit is None else f' and at most {limit}'}, got {k!r}")


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """One loss for each row ``(*batch,)``, averaged, summed or left as it is.

    Args:
        losses: ``(*batch,)``.
        reduction: as in ``torch.nn.functional``.

    Raises:
        ValueError: the reduction is not known.
    """
    check_choice(reduction, "reduction", ("mean", "sum", "none"))
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def floating(x: Tensor) -> Tensor:
    """Integers and bools as float64, which holds them exactly up to 2⁵³.

    Args:
        x: any real tensor.
    """
    return x if x.is_floating_point() else x.double()
