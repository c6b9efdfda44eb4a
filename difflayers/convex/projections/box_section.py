r"""Projection on a box cut by a hyperplane, by a search among the breakpoints of its multiplier.

.. math:: \{x : l \le x \le u,\; w^T x = c\}: \quad Π(x) = \operatorname{clip}(x - τ w, l, u), \qquad
   φ(τ) = w^T \operatorname{clip}(x - τ w, l, u) = c.

φ is piecewise linear and never increases; it bends where an entry reaches a bound. The 2n bends are sorted, the one before the
root is found by bisection in :math:`\log_2 2n` evaluations of φ, and on its segment, where the entries F are free,

.. math:: τ = \Bigl(\sum_{i \in F} w_i x_i + \sum_{i \notin F} w_i (l_i \text{ or } u_i) - c\Bigr) \Big/ \sum_{i \in F} w_i^2.

Only this last formula is differentiated, by autograd. Box-constrained knapsacks, capped simplices and the duals of support vector
machines are of this form.

Reference: Kiwiel, Breakpoint searching algorithms for the continuous quadratic knapsack problem, Mathematical Programming
112 (2008).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import ShapeError
from ...solution import OnFailure
from .arguments import Number, check_parameter, check_rows, failures_reported

__all__ = ["projection_box_section"]


def projection_box_section(x: Tensor, hyperparams: tuple[Number, Number, Tensor, Number], *, on_failure: OnFailure = "raise") -> Tensor:
    """The nearest point of {x : l ≤ x ≤ u, wᵀx = c}.

    Differentiable in x and in all the parameters. An entry at a bound is fixed, unless the multiplier is right at its bend.

    Args:
        x: ``(*batch, n)``.
        hyperparams: (l, u, w, c), the first three ``(*batch, n)`` (l and u may be numbers, with infinite entries), c ``(*batch,)``
            or a number. Weights have any sign.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where the set is empty: l > u, or c out of reach.

    Returns:
        ``(*batch, n)``.

    Raises:
        InfeasibleError: the set is empty (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_box_section
        >>> projection_box_section(torch.tensor([1.0, 0.4, 0.0]), (0.0, 0.5, torch.ones(3), 1.0))
        tensor([0.5000, 0.4500, 0.0500])
    """
    check_rows(x, "x", at_least=1)
    n = x.shape[-1]
    lower, upper, w = (
        check_parameter(part, name, x, (n,) if isinstance(part, Tensor) else ())
        for part, name in zip(hyperparams[:3], ("l", "u", "w"), strict=True)
    )
    c = check_parameter(hyperparams[3], "c", x, ()).unsqueeze(-1)
    try:
        x, lower, upper, w, _ = torch.broadcast_tensors(x, lower, upper, w, c)
        c = c.expand(*x.shape[:-1], 1)
    except RuntimeError as error:
        raise ShapeError("batch dimensions of x, l, u, w and c do not broadcast") from error
    free, at_upper, tau = _active_set(*(part.detach() for part in (x, lower, upper, w, c)))
    # A bound that is not active may be infinite, and must stay out of the graph.
    fixed = torch.where(at_upper, torch.where(at_upper, upper, 0), torch.where(free | at_upper, 0, lower))
    moving = torch.where(free, w, 0)
    square = (moving * moving).sum(-1, keepdim=True)
    # The projection does not change along w: from a point nearby, what is left of the step is small.
    near = x - tau * w
    excess = (moving * near).sum(-1, keepdim=True) + (w * fixed).sum(-1, keepdim=True) - c
    step = torch.where(square == 0, 0, excess) / torch.where(square == 0, 1, square)
    point = torch.where(free, near - step * moving, fixed)
    # Where rounding has carried a free entry over its bound, it is at the bound.
    point = torch.where(point < lower, lower, torch.where(point > upper, upper, point))
    # Comparisons with NaN are false, and would leave it out.
    broken = torch.isnan(torch.stack([x, lower, upper, w])).any(0).any(-1, keepdim=True) | torch.isnan(c)
    point = torch.where(broken, torch.nan, point)
    violation = _out_of_reach(*(part.detach() for part in (lower, upper, w, c)))
    return failures_reported(point, violation > 0, violation, "projection_box_section", on_failure)


def _active_set(x: Tensor, lower: Tensor, upper: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries are between their bounds at the root, which of the others are at the upper one, and the root."""
    zero = w == 0
    divisor = torch.where(zero, 1, w)
    bends = torch.stack([(x - upper) / divisor, (x - lower) / divisor], -1)
    first, last = bends.amin(-1), bends.amax(-1)
    # An entry without weight never bends.
    bends = torch.where(zero.unsqueeze(-1), torch.inf, bends).flatten(-2).sort(-1).values
    before, after = torch.where(w > 0, upper, lower), torch.where(w > 0, lower, upper)

    def height(tau: Tensor) -> Tensor:
        clipped = torch.where(tau <= first, before, torch.where(tau >= last, after, x - tau * w))
        return torch.where(zero, 0, w * clipped).sum(-1, keepdim=True)

    # φ is at least c at the first ``reached`` bends, and less at those from ``missed`` on, counted from one.
    reached = torch.zeros_like(c, dtype=torch.int64)
    missed = torch.full_like(reached, bends.shape[-1] + 1)
    for _ in range(math.ceil(math.log2(bends.shape[-1] + 1)) + 1):
        middle = (reached + missed) // 2
        tau = bends.gather(-1, (middle - 1).clamp(min=0))
        # Bends at infinity belong to bounds at infinity, where φ is on the same side whatever c is.
        high = torch.where(torch.isinf(tau), tau < 0, height(torch.where(torch.isinf(tau), 0, tau)) >= c)
        high = high | (middle == 0)
        reached, missed = torch.where(high, middle, reached), torch.where(high, missed, middle)
    count = bends.shape[-1]
    left = torch.where(reached > 0, bends.gather(-1, (reached - 1).clamp(min=0)), -torch.inf)
    right = torch.where(reached < count, bends.gather(-1, reached.clamp(max=count - 1)), torch.inf)
    sloped = ~zero & (first <= left) & (last >= right) & (first < last)
    square = torch.where(sloped, w * w, 0).sum(-1, keepdim=True)
    anchor = torch.where(torch.isfinite(left), left, torch.where(torch.isfinite(right), right, 0))
    tau = anchor + torch.where(square > 0, (_height_at(anchor, sloped, x, w, first, before, after, zero) - c), 0) / torch.where(
        square > 0, square, 1
    )
    inside = torch.where(zero, (x >= lower) & (x <= upper), (first <= tau) & (tau <= last))
    at_upper = ~inside & torch.where(zero, x > upper, torch.where(w > 0, tau < first, tau > last))
    return inside, at_upper, tau


def _height_at(tau: Tensor, sloped: Tensor, x: Tensor, w: Tensor, first: Tensor, before: Tensor, after: Tensor, zero: Tensor) -> Tensor:
    """φ at the end of its segment, with the free entries of the segment taken as such."""
    clipped = torch.where(sloped, x - tau * w, torch.where(tau < first, before, after))
    return torch.where(zero, 0, w * clipped).sum(-1, keepdim=True)


def _out_of_reach(lower: Tensor, upper: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """By how much the constraints contradict each other, beyond rounding: ``(*batch,)``, zero where they do not."""
    ends = torch.stack([torch.where(w == 0, 0, w * lower), torch.where(w == 0, 0, w * upper)])
    least, most = ends.amin(0).sum(-1, keepdim=True), ends.amax(0).sum(-1, keepdim=True)
    size = torch.where(torch.isfinite(ends), ends.abs(), 0).sum(0).sum(-1, keepdim=True) + c.abs()
    slack = 8 * torch.finfo(c.dtype).eps * size
    miss = torch.maximum(c - most, least - c)
    crossed = (lower - upper).amax(-1, keepdim=True)
    return torch.where(crossed > 0, crossed, torch.where(miss > slack, miss, 0)).squeeze(-1)
