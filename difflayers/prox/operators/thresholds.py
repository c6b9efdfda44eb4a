r"""Thresholds: proximal operators that act on every entry alone, and the largest k entries.

.. math::
   S_λ(x) = \operatorname{sign}(x) \max(|x| - λ, 0), \qquad
   H_λ(x) = x \, 1_{|x| \ge λ}, \qquad
   F_{λ,μ}(x) = \begin{cases} 0 & |x| < λ \\ \operatorname{sign}(x) \frac{|x| - λ}{1 - λ/μ} & λ \le |x| < μ \\ x & |x| \ge μ \end{cases}

The soft threshold is the operator of λ‖x‖₁, the hard one that of ½λ²‖x‖₀ (so λ‖x‖₀ has the threshold √(2λ)), and the firm one that of the
minimax concave penalty λ|u| − λu²/(2μ), constant from |u| = μ on; it is soft for μ = ∞ and hard for μ = λ. The k entries of largest size
are the nearest point with at most k nonzeros. All are formulas, which autograd differentiates. At a threshold the derivative of the soft
one is that of the inside, zero; that of the others is that of the outside.

References: Donoho and Johnstone, Ideal spatial adaptation by wavelet shrinkage, Biometrika 81 (1994); Gao and Bruce, WaveShrink with
firm shrinkage, Statistica Sinica 7 (1997); Zhang, Nearly unbiased variable selection under minimax concave penalty, Annals of
Statistics 38 (2010), arXiv:1002.4734.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...convex.projections.arguments import check_rows
from ...solution import OnFailure
from .arguments import Number, check_entries, check_entry_weight, entry_weight, negative, weights_reported

__all__ = ["firm_threshold", "hard_threshold", "prox_l0", "shrunk", "soft_threshold", "top_k_abs"]


def soft_threshold(x: Tensor, lam: Number, *, on_failure: OnFailure = "raise") -> Tensor:
    """The proximal operator of λ‖x‖₁: every entry moves towards zero by λ. Entries of the size λ have the derivative zero.

    Args:
        x: any shape.
        lam: λ ≥ 0, a number or a tensor that broadcasts against x.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ is negative. ``"nan"`` never waits for a device.

    Returns:
        The shape of x and λ broadcast.

    Raises:
        NotConvergedError: λ is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import soft_threshold
        >>> soft_threshold(torch.tensor([-2.0, 0.3, 1.5]), 0.5)
        tensor([-1.5000,  0.0000,  1.0000])
    """
    check_entries(x)
    check_entry_weight(lam, "lam", x)
    return weights_reported(shrunk(x, lam), negative(lam), "soft_threshold", on_failure, core_ndim=0)


def hard_threshold(x: Tensor, lam: Number, *, on_failure: OnFailure = "raise") -> Tensor:
    """Entries smaller than λ become zero, the others stay: the proximal operator of ½λ²‖x‖₀.

    An entry of size λ, where both are minimizers, stays. The derivative in λ is zero, although the value jumps.

    Args:
        x: any shape.
        lam: λ ≥ 0, the threshold, a number or a tensor that broadcasts against x.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ is negative.

    Returns:
        The shape of x and λ broadcast.

    Raises:
        NotConvergedError: λ is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import hard_threshold
        >>> hard_threshold(torch.tensor([-2.0, 0.3, 1.5]), 0.5)
        tensor([-2.0000,  0.0000,  1.5000])
    """
    check_entries(x)
    point = _kept(x, entry_weight(lam, "lam", x).detach())
    return weights_reported(point, negative(lam), "hard_threshold", on_failure, core_ndim=0)


def prox_l0(x: Tensor, lam: Number, *, on_failure: OnFailure = "raise") -> Tensor:
    """The proximal operator of λ‖x‖₀, the number of nonzeros: the hard threshold at √(2λ).

    An entry at the threshold stays. The derivative in λ is zero, although the value jumps.

    Args:
        x: any shape.
        lam: λ ≥ 0, a number or a tensor that broadcasts against x.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ is negative.

    Returns:
        The shape of x and λ broadcast.

    Raises:
        NotConvergedError: λ is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_l0
        >>> prox_l0(torch.tensor([-2.0, 0.9, 1.5]), 0.5)
        tensor([-2.0000,  0.0000,  1.5000])
    """
    check_entries(x)
    point = _kept(x, (2 * entry_weight(lam, "lam", x).detach()).sqrt())
    return weights_reported(point, negative(lam), "prox_l0", on_failure, core_ndim=0)


def firm_threshold(x: Tensor, lam: Number, mu: Number, *, on_failure: OnFailure = "raise") -> Tensor:
    """Zero below λ, x from μ on, and a line between: the proximal operator of the minimax concave penalty.

    Args:
        x: any shape.
        lam: λ ≥ 0, a number or a tensor that broadcasts against x.
        mu: μ ≥ λ, likewise; may be infinite.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ is negative or larger than μ.

    Returns:
        The shape of x, λ and μ broadcast.

    Raises:
        NotConvergedError: λ is negative, or larger than μ, somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import firm_threshold
        >>> firm_threshold(torch.tensor([-2.0, 0.3, 0.75, 1.5]), 0.5, 1.0)
        tensor([-2.0000,  0.0000,  0.5000,  1.5000])
    """
    check_entries(x)
    first, last = entry_weight(lam, "lam", x), entry_weight(mu, "mu", x)
    if not isinstance(lam, Tensor) and not isinstance(mu, Tensor):
        if not mu >= lam:
            raise ValueError(f"mu must be at least lam, got {mu} and {lam}")
        violation = None
    else:
        violation = torch.maximum(-first.detach(), (first - last).detach())
    size = x.abs()
    # μ = λ leaves nothing between, and must stay out of the graph.
    between = first < last
    slope = 1 - torch.where(between, first, 0) / torch.where(between, last, 1)
    line = (x - x.sign() * first) / slope
    point = torch.where(size < first, 0, torch.where(size >= last, x, line))
    rule = "lam must not be negative, nor larger than mu"
    return weights_reported(point, violation, "firm_threshold", on_failure, core_ndim=0, rule=rule)


def top_k_abs(x: Tensor, k: int) -> Tensor:
    """The k entries of largest size, with their signs; zero elsewhere. Also known as AbsTopK.

    A nearest point of {x : ‖x‖₀ ≤ k}, which is not convex. Of entries of the same size the first ones are kept. The derivative is
    that of the choice made: 1 for what is kept, 0 elsewhere.

    Args:
        x: ``(*batch, n)``.
        k: how many to keep, at least 0; n or more keep all.

    Returns:
        ``(*batch, n)``. A row with a NaN is NaN.

    Raises:
        ShapeError: x is not a floating tensor of rows.
        ValueError: k is negative.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import top_k_abs
        >>> top_k_abs(torch.tensor([0.5, -3.0, 2.0, -2.0]), 2)
        tensor([ 0., -3.,  2.,  0.])
    """
    check_rows(x, "x")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if k >= x.shape[-1]:
        return x.clone()
    size = x.detach().abs()
    broken = size.isnan().any(-1, keepdim=True)
    if k == 0:
        kept = torch.zeros_like(broken)
    else:
        least = size.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        above, level = size > least, size == least
        # torch.topk takes any of those that are level.
        kept = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return torch.where(broken, torch.nan, torch.where(kept, x, 0))


def shrunk(x: Tensor, threshold: Number) -> Tensor:
    """The soft threshold, for a threshold that was checked.

    Args:
        x: any shape.
        threshold: broadcasts against x.
    """
    bound: Any = threshold  # torch.clamp is typed for two tensors or two numbers
    return x - torch.clamp(x, -bound, bound)


def _kept(x: Tensor, threshold: Tensor) -> Tensor:
    point = torch.where(x.abs() < threshold, 0, x)
    return torch.where(threshold.isnan(), torch.nan, point)
