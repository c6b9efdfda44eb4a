"""What the projections ask of their arguments, and what they say when no point satisfies them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ShapeError
from ...implicit.broadcasting import BroadcastingProblem
from ...implicit.closure import visible_to_modes
from ...implicit.eager import eager
from ...implicit.function import ImplicitFunction, in_a_transform
from ...solution import OnFailure, Solution, Status, report_failures

__all__ = ["Number", "check_parameter", "check_rows", "failures_reported", "negative_radius_reported", "radius", "status_reported"]

Number = Tensor | float


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


def check_parameter(value: Any, name: str, x: Tensor, core: Sequence[int | None]) -> Tensor:
    """A parameter as a tensor that fits x: a number becomes one, the last dimensions of a tensor are checked.

    Args:
        value: a number, or a tensor ``(*batch, *core)``.
        name: what the message calls it.
        x: ``(*batch, n)``, whose dtype and device are wanted.
        core: the sizes wanted of the dimensions after the batch; None is any size.

    Raises:
        ShapeError: with what came.
    """
    if not isinstance(value, Tensor):
        return torch.full([size or 1 for size in core], value, dtype=x.dtype, device=x.device)
    if value.dtype != x.dtype or value.device != x.device:
        raise ShapeError(f"{name} is {value.dtype} on {value.device}, x is {x.dtype} on {x.device}; convert one of them")
    sizes = value.shape[value.dim() - len(core) :]
    if value.dim() < len(core) or any(size not in (None, came) for size, came in zip(core, sizes, strict=True)):
        wanted = ", ".join(["*batch", *("m" if size is None else str(size) for size in core)])
        raise ShapeError(f"{name} must have the shape ({wanted}), got {tuple(value.shape)}")
    return value


def radius(value: Number, name: str, x: Tensor) -> Tensor:
    """A radius ``(*batch,)`` or number as ``(*batch, 1)``.

    Raises:
        ShapeError: its batch does not broadcast with that of x.
        ValueError: a number is negative.
    """
    if not isinstance(value, Tensor) and value < 0:
        raise ValueError(f"{name} must not be negative, got {value}: the set would be empty")
    size = check_parameter(value, name, x, ()).unsqueeze(-1)
    try:
        torch.broadcast_shapes(size.shape[:-1], x.shape[:-1])
    except RuntimeError as error:
        raise ShapeError(f"{name} must have the shape (*batch,) of x, got {tuple(size.shape[:-1])} and {tuple(x.shape)}") from error
    return size


def failures_reported(
    point: Tensor,
    infeasible: Tensor,
    violation: Tensor,
    what: str,
    on_failure: OnFailure,
    *,
    core_ndim: int = 1,
    missed: Tensor | None = None,
) -> Tensor:
    """The point, after a report of the elements whose set is empty; with ``"nan"`` those are NaN and pass no cotangent on.

    Args:
        point: ``(*batch, ...)``.
        infeasible: ``(*batch,)`` bool, the set is empty.
        violation: ``(*batch,)``, by how much the constraints contradict each other.
        what: the projection's name.
        on_failure: the caller's choice.
        core_ndim: the dimensions of one point.
        missed: ``(*batch,)`` bool, elements whose solver did not reach its tolerance.
    """
    status = torch.where(infeasible, int(Status.PRIMAL_INFEASIBLE), int(Status.SOLVED))
    if missed is not None:
        status = torch.where(missed & ~infeasible, int(Status.MAX_ITER), status)
    return status_reported(point, status, violation, what, on_failure, core_ndim=core_ndim)


def status_reported(point: Tensor, status: Tensor, violation: Tensor, what: str, on_failure: OnFailure, *, core_ndim: int = 1) -> Tensor:
    """The point, after a report of the elements without a solution; with ``"nan"`` those are NaN and pass no cotangent on.

    Args:
        point: ``(*batch, ...)``.
        status: ``(*batch,)``, or what broadcasts to it.
        violation: how far from a problem with a solution, of the shape of ``status``.
        what: the function's name.
        on_failure: the caller's choice.
        core_ndim: the dimensions of one point.
    """
    if on_failure != "nan":
        _report(_Report(what, on_failure, point.dim() - core_ndim, core_ndim), point.detach(), status, violation.detach())
        return point
    failed = (status != Status.SOLVED).reshape((*status.shape, *[1] * core_ndim))
    return torch.where(failed, torch.nan, point)


def negative_radius_reported(point: Tensor, r: Tensor, given: Number, what: str, on_failure: OnFailure) -> Tensor:
    """As :func:`failures_reported` for a set that is empty where its radius is negative.

    Args:
        point: ``(*batch, n)``.
        r: ``(*batch, 1)``, the radius.
        given: the radius as the caller gave it; a number was checked by :func:`radius`.
        what: the projection's name.
        on_failure: the caller's choice.
    """
    if not isinstance(given, Tensor) and on_failure in ("raise", "nan", "warn"):
        return point
    r = r.detach().squeeze(-1)
    return failures_reported(point, r < 0, -r, what, on_failure)


@eager
def _report(report: _Report, *operands: Tensor) -> None:
    nothing = operands[0].new_zeros(0)
    if in_a_transform(*operands):
        # On plain tensors, below all transforms: whether to raise depends on the data.
        ImplicitFunction.apply(report, nothing, *visible_to_modes(operands))
    else:
        report.find(nothing, operands)


class _Report(BroadcastingProblem):
    """Nothing to solve, only failures to report, for all elements of all vmaps at once."""

    def __init__(self, what: str, on_failure: OnFailure, batch_ndim: int, core_ndim: int) -> None:
        super().__init__(batch_ndim, on_failure=on_failure)
        self.what, self.core_ndims = what, (core_ndim, 0, 0)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        point, status, violation = theta
        if self.on_failure in ("raise", "warn") and not bool(status.any()):
            return (x0.clone(),)
        batch = torch.broadcast_shapes(point.shape[: point.dim() - self.core_ndims[0]], status.shape)
        point = point.expand((*batch, *point.shape[point.dim() - self.core_ndims[0] :]))
        status, violation = status.expand(batch), violation.expand(batch)
        report_failures(Solution(point, status, violation, torch.zeros_like(status)), self.what, self.on_failure)
        return (x0.clone(),)

    def deeper(self, size: int) -> _Report:
        return _Report(self.what, self.on_failure, self.batch_ndim + 1, self.core_ndims[0])
