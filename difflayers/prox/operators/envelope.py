r"""The group sparse envelope, the best convex stand-in for "at most k nonzero groups", and its proximal operator.

.. math::
   S_k = \Bigl(\tfrac12 \sum_j d_j \|x_j\|^2 + δ(\text{at most } k \text{ groups are nonzero})\Bigr)^{**}
   = \tfrac12 \min_{0 \le u \le 1,\; Σu \le k} \; \sum_j \frac{d_j \|x_j\|^2}{u_j}.

With single entries and d = 1 it is half the square of the k-support norm. With :math:`a_j = \sqrt{d_j}\|x_j\|` the minimizer is
:math:`u_j = \min(a_j / t, 1)` with Σu = k. In the proximal operator of λS_k it is

.. math:: u_j = \operatorname{clip}(a_j / t - λ d_j, 0, 1), \quad Σu = k, \qquad
   p_j = \begin{cases} 0 & u_j = 0 \\ x_j - λ \sqrt{d_j}\, t\, x_j / \|x_j\| & 0 < u_j < 1 \\ x_j / (1 + λ d_j) & u_j = 1, \end{cases}

so the middle groups get shorter, the large ones are scaled. Σu is piecewise linear in s = 1/t; its bends are sorted, and the one
before the root is found by bisection. On the segment the root is a ratio of sums over the middle groups F,
:math:`s = (k - |\{u_j = 1\}| + λ Σ_F d_j) / Σ_F a_j`, which autograd differentiates to any order. Where at most k groups are
nonzero, u = 1.

References: Argyriou, Foygel and Srebro, Sparse prediction with the k-support norm, NIPS 2012, arXiv:1204.5043; Beck and Refael, Sparse
regularization via bidualization, Journal of Global Optimization 82 (2022); Lai, Pong, Fu and Tang, New perspectives on k-support and
cluster norms, JMLR 17 (2016), arXiv:1512.08204 (the spectral form).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...convex.projections.arguments import check_rows
from ...solution import OnFailure
from .arguments import Number, negative, row_weight, weights_reported
from .groups import GroupLabels, Groups, group_norms, group_weights, read_groups

__all__ = ["group_sparse_envelope", "prox_group_sparse"]


def group_sparse_envelope(x: Tensor, k: int, groups: GroupLabels | None = None, weights: Tensor | None = None) -> Tensor:
    """The largest convex function below ½ Σ dⱼ‖xⱼ‖² on points with at most k nonzero groups: ½ k-support norm², for single entries.

    Args:
        x: ``(*batch, n)``.
        k: at least 1.
        groups: for each entry the number of its group, ``(n,)`` integers from 0; or a list of lists of indices. None for single entries.
        weights: d ≥ 0, ``(*batch, number of groups)``; None for ones.

    Returns:
        ``(*batch,)``. NaN where a weight is negative.

    Raises:
        ShapeError: shapes or dtypes do not fit.
        ValueError: k is less than 1, or the groups overlap.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import group_sparse_envelope
        >>> group_sparse_envelope(torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), 2)
        tensor([4.5000, 2.2500])
    """
    _, d, a = _read(x, k, groups, weights)
    if a.shape[-1] <= k:
        return _checked(a.square().sum(-1) / 2, d)
    ordered = a.sort(-1, descending=True).values
    # The sums of what is left after the first q entries, for q < k.
    rest = ordered.detach().flip(-1).cumsum(-1).flip(-1)[..., :k]
    left = k - torch.arange(k, dtype=x.dtype, device=x.device)
    # u = 1 for an entry that is at least the mean of what is left for the others; this holds for the first q of them.
    large = (ordered.detach()[..., :k] * left >= rest) & (rest > 0)
    q = large.to(torch.int64).cumprod(-1).sum(-1, keepdim=True).clamp(max=k - 1)
    first = torch.arange(a.shape[-1], device=x.device) < q
    level = torch.where(first, 0, ordered).sum(-1)
    value = (torch.where(first, ordered, 0).square().sum(-1) + level.square() / (k - q.squeeze(-1))) / 2
    return _checked(value, d)


def prox_group_sparse(
    x: Tensor,
    lam: Number,
    k: int,
    groups: GroupLabels | None = None,
    weights: Tensor | None = None,
    *,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The proximal operator of λ times :func:`group_sparse_envelope`. It has between k and all groups nonzero: not a hard top-k.

    Differentiable in x, λ and the weights. At a bend the derivative is that of one side.

    Args:
        x: ``(*batch, n)``.
        lam: λ ≥ 0, ``(*batch,)`` or a number.
        k: at least 1.
        groups: for each entry the number of its group, ``(n,)`` integers from 0; or a list of lists of indices. None for single entries.
            An entry of no group stays as it is.
        weights: d ≥ 0, ``(*batch, number of groups)``; None for ones.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ or a weight is negative.

    Returns:
        ``(*batch, n)``.

    Raises:
        NotConvergedError: λ or a weight is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.
        ValueError: k is less than 1, or the groups overlap.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_group_sparse
        >>> prox_group_sparse(torch.tensor([4.0, 1.0, 0.9, 0.1]), 1.0, 2)
        tensor([2.0000, 0.3667, 0.2667, 0.0000])
    """
    members, d, a = _read(x, k, groups, weights)
    scale = row_weight(lam, "lam", x)
    c = scale * d
    a, c, d = torch.broadcast_tensors(a, c, d)
    middle, whole = _pieces(a.detach(), c.detach(), k)
    total = torch.where(middle, a, 0).sum(-1, keepdim=True)
    share = k - whole.sum(-1, keepdim=True) + torch.where(middle, c, 0).sum(-1, keepdim=True)
    # t = 1 / s; without a middle group it does not matter.
    moves = total > 0
    t = torch.where(moves, total, 0) / torch.where(moves, share, 1)
    norms = group_norms(x, members)
    some = middle & (norms > 0)
    loss = scale * torch.where(some, d, 1).sqrt() * t / torch.where(some, norms, 1)
    ratio = torch.where(some, loss, torch.where(whole, c / (1 + c), 0))
    stays = (members.labels == members.count) | (members.gathered((middle | whole).to(x.dtype)) > 0)
    point = torch.where(stays, x - members.gathered(ratio) * x, 0)
    # Comparisons with NaN are false, and would leave it out.
    point = torch.where((a.isnan() | c.isnan()).any(-1, keepdim=True), torch.nan, point)
    violation = negative(lam, None if weights is None else weights.amin(-1)) if members.count else negative(lam)
    rule = "lam and weights must not be negative"
    return weights_reported(point, violation, "prox_group_sparse", on_failure, core_ndim=1, rule=rule)


def _read(x: Tensor, k: int, groups: GroupLabels | None, weights: Tensor | None) -> tuple[Groups, Tensor, Tensor]:
    """The groups, d ``(*batch, count)`` and a = √d ‖x_g‖."""
    check_rows(x, "x")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    members = read_groups(groups, x, None if weights is None else weights.shape[-1])
    d = group_weights(weights, members.count, x)
    positive = d > 0
    root = torch.where(positive, torch.where(positive, d, 1).sqrt(), 0)
    return members, d, root * group_norms(x, members)


def _pieces(a: Tensor, c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which groups are in the middle, and which are whole (u = 1): ``(*batch, count)`` bool."""
    count = a.shape[-1]
    zero = a == 0
    safe = torch.where(zero, 1, a)
    # The bends of each group in s = 1/t. A group without penalty never vanishes, one without entries never grows.
    first = torch.where(c == 0, 0, torch.where(zero, torch.inf, c / safe))
    last = torch.where(zero, torch.inf, (1 + c) / safe)
    bends = torch.cat([first, last], -1).sort(-1).values
    # Σu is at most k at the bend ``reached``, and more at ``missed``.
    reached = torch.zeros_like(bends[..., :1], dtype=torch.int64)
    missed = torch.full_like(reached, 2 * count)
    for _ in range(math.ceil(math.log2(max(2 * count, 1))) + 1):
        between = (reached + missed) // 2
        s = bends.gather(-1, between)
        endless = torch.isinf(s)
        low = ~endless & ((a * torch.where(endless, 0, s) - c).clamp(0, 1).sum(-1, keepdim=True) <= k)
        low = low | (between == reached)
        reached, missed = torch.where(low, between, reached), torch.where(low, missed, between)
    left = bends.gather(-1, reached)
    right = torch.where(missed < 2 * count, bends.gather(-1, missed.clamp(max=2 * count - 1)), torch.inf)
    middle, whole = (first <= left) & (last >= right), last <= left
    nonzero = (~zero).sum(-1, keepdim=True)
    full = nonzero <= k
    return middle & ~full, torch.where(full, ~zero | (c == 0) | (nonzero < k), whole)


def _checked(value: Tensor, d: Tensor) -> Tensor:
    return torch.where((d >= 0).all(-1), value, torch.nan)
