"""Bisection for scalar equations f(x) = 0 with a bracket: f changes sign between ``lower`` and ``upper``.

The bracket is halved until it is as short as ``tol`` asks. It cannot fail on a continuous f, and every element of the batch
is its own equation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ShapeError
from ..solution import Solution, Status
from .loop import Rows, check_options

__all__ = ["bisection"]


@torch.no_grad()
def bisection(
    residual_fn: Callable[[Tensor], Tensor],
    lower: Tensor,
    upper: Tensor,
    *,
    tol: float | None = None,
    max_iter: int = 200,
    check_bracket: bool = True,
) -> Solution:
    """Halve the bracket of each element.

    Args:
        residual_fn: f, maps a tensor ``(*batch,)`` to one of the same shape, element by element.
        lower: ``(*batch,)``, one end of the brackets.
        upper: ``(*batch,)``, the other end; broadcast against ``lower``.
        tol: length of the final bracket relative to ``|x|``; None for 4 eps.
        max_iter: halvings.
        check_bracket: raise if f has the same sign at both ends of an element; otherwise such an element ends with
            NUMERICAL_ERROR and the better of its two ends.

    Returns:
        :class:`~difflayers.Solution`: x is the end or midpoint with the smallest ``|f|`` seen, the residual is the final bracket's length
        relative to ``|x|``. Where an end of the bracket is not finite, or f is NaN there, the status is NUMERICAL_ERROR.

    Raises:
        ShapeError: ``lower`` and ``upper`` are not floating tensors of one dtype, or f changes the shape.
        ValueError: with ``check_bracket``, f has the same sign at both ends of some element.

    Example:
        >>> bisection(lambda x: x**3 - torch.tensor([1.0, 8.0]), torch.tensor(0.0), torch.tensor(5.0)).x
        tensor([1.0000, 2.0000])
    """
    check_options(tol, max_iter)
    lower, upper, f_lower, f_upper = _bracket(residual_fn, lower, upper)
    eps = torch.finfo(lower.dtype).eps
    tol = 4 * eps if tol is None else tol
    least = eps**0.5 * torch.maximum(lower.abs(), upper.abs())
    same_sign = torch.sign(f_lower) * torch.sign(f_upper) > 0
    if check_bracket and bool(same_sign.any()):
        where = [tuple(index) for index in same_sign.nonzero().tolist()]
        raise ValueError(
            f"f has the same sign at both ends of {len(where)} of {same_sign.numel()} brackets, first at index {where[0]}: "
            f"f({lower[same_sign][0]:g}) = {f_lower[same_sign][0]:g}, f({upper[same_sign][0]:g}) = {f_upper[same_sign][0]:g}; "
            "widen the bracket, or pass check_bracket=False to have those elements fail alone"
        )
    rows = Rows(lower[..., None])
    rows.record(lower[..., None], f_lower.abs())
    rows.record(upper[..., None], f_upper.abs())
    sound = torch.isfinite(lower) & torch.isfinite(upper) & ~torch.isnan(f_lower) & ~torch.isnan(f_upper)
    rows.stop(same_sign | ~sound, Status.NUMERICAL_ERROR)
    width = (upper - lower).abs()
    for _ in range(max_iter):
        rows.stop((rows.residual == 0) | (width <= tol * torch.maximum(rows.x.squeeze(-1).abs(), least)), Status.SOLVED)
        if not rows.any_running():
            break
        # This form can neither overflow nor leave the bracket.
        middle = lower / 2 + upper / 2
        f_middle = residual_fn(middle)
        rows.count()
        rows.record(middle[..., None], f_middle.abs())
        rows.stop(torch.isnan(f_middle), Status.NUMERICAL_ERROR)
        left = rows.running & (torch.sign(f_middle) == torch.sign(f_lower))
        lower = torch.where(left, middle, lower)
        upper = torch.where(rows.running & ~left, middle, upper)
        width = (upper - lower).abs()
    x, status, f, iterations = rows.solution()
    x = x.squeeze(-1)
    residual = torch.where(f == 0, 0, width / torch.maximum(x.abs(), least))
    return Solution(x, status, residual, iterations)


def _bracket(residual_fn: Callable[[Tensor], Tensor], lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ends of one shape, and f there."""
    ends = (lower, upper)
    if not all(isinstance(end, Tensor) and end.is_floating_point() for end in ends) or lower.dtype != upper.dtype:
        came = ", ".join(str(end.dtype) if isinstance(end, Tensor) else type(end).__name__ for end in ends)
        raise ShapeError(f"lower and upper must be floating tensors of one dtype, got {came}")
    lower, upper = torch.broadcast_tensors(lower, upper)
    f_lower, f_upper = residual_fn(lower), residual_fn(upper)
    fits = f_lower.dim() >= lower.dim() and all(s in (1, t) for s, t in zip(reversed(lower.shape), reversed(f_lower.shape), strict=False))
    if f_lower.shape != lower.shape and fits:
        # f may bring the batch with it, a tensor of parameters for one shared bracket.
        lower, upper = lower.expand(f_lower.shape), upper.expand(f_lower.shape)
        f_lower, f_upper = residual_fn(lower), residual_fn(upper)
    if f_lower.shape != lower.shape or f_upper.shape != upper.shape:
        raise ShapeError(f"residual_fn must keep the shape {tuple(lower.shape)}, got {tuple(f_lower.shape)}")
    return lower, upper, f_lower, f_upper
