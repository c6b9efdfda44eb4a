"""What the operators ask of their arguments, and what they say of a weight that is negative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...convex.projections.arguments import Number, check_parameter, status_reported
from ...errors import ShapeError
from ...solution import OnFailure, Status

__all__ = ["Number", "check_entries", "check_entry_weight", "entry_weight", "negative", "row_weight", "weights_reported"]


def check_entries(x: Any, name: str = "x") -> None:
    """Refuse what is not a floating tensor.

    Args:
        x: the argument, of any shape.
        name: what the message calls it.

    Raises:
        ShapeError: with what came.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ShapeError(f"{name} must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")


def entry_weight(value: Number, name: str, x: Tensor, *, positive: bool = False) -> Tensor:
    """A number, or a tensor that broadcasts against x, as a tensor.

    Args:
        value: the argument.
        name: what the message calls it.
        x: any shape.
        positive: a number must not be zero either.

    Raises:
        ShapeError: it does not broadcast, or has another dtype or device.
        ValueError: a number is negative, or zero and must not be.
    """
    check_entry_weight(value, name, x, positive=positive)
    return check_parameter(value, name, x, ())


def check_entry_weight(value: Number, name: str, x: Tensor, *, positive: bool = False) -> None:
    """The checks of :func:`entry_weight`, where a number is as good as a tensor."""
    if not isinstance(value, Tensor):
        _check_number(value, name, positive)
        return
    check_parameter(value, name, x, ())
    if not value.dim():
        return
    try:
        torch.broadcast_shapes(value.shape, x.shape)
    except RuntimeError as error:
        raise ShapeError(f"{name} must broadcast against x, got {tuple(value.shape)} and {tuple(x.shape)}") from error


def row_weight(value: Number, name: str, x: Tensor, *, core_ndim: int = 1) -> Tensor:
    """A number or ``(*batch,)`` as ``(*batch, 1)``, with as many ones as a point of x has dimensions.

    Args:
        value: the argument.
        name: what the message calls it.
        x: ``(*batch, n)``.
        core_ndim: the dimensions of one point.

    Raises:
        ShapeError: its batch does not broadcast with that of x, or it has another dtype or device.
        ValueError: a number is negative.
    """
    _check_number(value, name, positive=False)
    weight = check_parameter(value, name, x, ())
    try:
        torch.broadcast_shapes(weight.shape, x.shape[: x.dim() - core_ndim])
    except RuntimeError as error:
        raise ShapeError(f"{name} must have the shape (*batch,) of x, got {tuple(weight.shape)} and {tuple(x.shape)}") from error
    return weight.reshape((*weight.shape, *[1] * core_ndim))


def negative(*given: Number | None) -> Tensor | None:
    """By how much the worst of the weights is below zero; None if all of them are numbers, which were checked.

    Args:
        given: weights as the caller gave them, whose shapes broadcast.
    """
    violation = None
    for weight in given:
        if isinstance(weight, Tensor):
            below = -weight.detach()
            violation = below if violation is None else torch.maximum(violation, below)
    return violation


def weights_reported(
    point: Tensor, violation: Tensor | None, what: str, on_failure: OnFailure, *, core_ndim: int, rule: str = "lam must not be negative"
) -> Tensor:
    """The point, after a report of the elements whose weights are refused; with ``"nan"`` those are NaN and pass no cotangent on.

    Args:
        point: ``(*batch, ...)``.
        violation: ``(*batch,)``, positive where a weight is refused; None where none can be.
        what: the operator's name.
        on_failure: the caller's choice.
        core_ndim: the dimensions of one point: none where every entry is a problem of its own.
        rule: what is asked of the weights.
    """
    if violation is None:
        if on_failure not in ("raise", "nan", "warn"):
            raise ValueError(f"on_failure={on_failure!r} is not known; choose 'raise', 'nan' or 'warn'")
        return point
    status = torch.where(violation > 0, int(Status.NUMERICAL_ERROR), int(Status.SOLVED))
    return status_reported(point, status, violation, f"{what} ({rule})", on_failure, core_ndim=core_ndim)


def _check_number(value: Number, name: str, positive: bool) -> None:
    if isinstance(value, Tensor):
        return
    if not (value > 0 if positive else value >= 0):
        raise ValueError(f"{name} must {'be positive' if positive else 'not be negative'}, got {value}")
