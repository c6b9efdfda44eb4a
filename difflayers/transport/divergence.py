r"""Distances between weighted point clouds, and between a map and an optimal one, that are zero where they should be.

With the entropic cost :math:`W_ε(x, y) = \min_P ⟨P, C⟩ + ε \sum P \log P` of points x and y with weights a and b (the ``dual_value`` of
:func:`~difflayers.transport.sinkhorn`),

.. math:: S_ε(x, y) = W_ε(x, y) - \tfrac12 W_ε(x, x) - \tfrac12 W_ε(y, y) \ge 0, \qquad
   M_ε(x, T) = \frac1n \sum_i c(x_i, T x_i) - W_ε(x, T x) - ε \log n \ge 0 .

The entropies of the marginals cancel in S, so that it is the divergence that others define by the relative entropy of P to the product of
the marginals. Where the marginals may be missed at a price they do not, and W is made with that relative entropy itself: ε (log a ⊕ log
b) is taken off the cost. M is the excess of the map's cost over the cheapest way to send x to T x, and goes to zero with ε if T is
optimal. Gradients need no linear system (the envelope theorem); they flow through both arguments of every cost.

References: Feydy et al., Interpolating between optimal transport and MMD using Sinkhorn divergences, AISTATS 2019, arXiv:1810.08278;
Séjourné, Feydy, Vialard, Trouvé and Peyré, Sinkhorn divergences for unbalanced optimal transport, 2019, arXiv:1910.12958; Uscidda and
Cuturi, The Monge gap, ICML 2023, arXiv:2302.04953.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError
from ..solution import OnFailure, Status
from .arguments import check_clouds
from .costs import squared_distances
from .points import PointsSolution, sinkhorn_points
from .sinkhorn import TransportSolution, sinkhorn
from .unbalanced import Penalty

__all__ = ["DivergenceSolution", "monge_gap", "sinkhorn_divergence"]

Cost = Callable[[Tensor, Tensor], Tensor]


class DivergenceSolution(NamedTuple):
    """What :func:`sinkhorn_divergence` and :func:`monge_gap` return; the value is differentiable.

    Attributes:
        value: ``(*batch,)``, not negative up to rounding.
        status: ``(*batch,)`` codes of :class:`~difflayers.Status`: that of the first transport problem which is not solved.
        marginal_error: ``(*batch,)``, the largest of the transport problems.
        iterations: ``(*batch,)`` int64, of all of them together.
    """

    value: Tensor
    status: Tensor
    marginal_error: Tensor
    iterations: Tensor


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    cost: Cost | None = None,
    marginal_penalty: Penalty = None,
    block_size: int | Literal["auto"] | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    on_failure: OnFailure = "raise",
) -> DivergenceSolution:
    """The Sinkhorn divergence of two weighted point clouds: zero if they are equal, positive otherwise, smooth in points and weights.

    Small ε compares as optimal transport does, large ε only the means (for the squared distance).

    Args:
        x: ``(*batch, n, d)``.
        y: ``(*batch, m, d)``.
        a: ``(*batch, n)``, weights of x. None: 1/n each.
        b: ``(*batch, m)``, weights of y, with the sum of a unless there is a ``marginal_penalty``. None: 1/m each.
        epsilon: the temperature, in units of the cost.
        cost: ``(x, y) -> (*batch, n, m)``, symmetric; None: squared Euclidean distances.
        marginal_penalty: as in :func:`~difflayers.transport.sinkhorn`, the same for both clouds: mass may also appear and vanish, at
            this price. Points that are alone then do not pull at everything else.
        block_size: for large clouds: points at a time, or "auto" for blocks of 4 MB. Cost matrices are then never formed, and memory
            is O(n + m) in value and derivatives (:func:`~difflayers.transport.sinkhorn_points`; marginals must be met). None: three
            matrices.
        tol: as in :func:`~difflayers.transport.sinkhorn`.
        max_iter: as in :func:`~difflayers.transport.sinkhorn`.
        on_failure: as in :func:`~difflayers.transport.sinkhorn`.

    Returns:
        :class:`DivergenceSolution`.

    Raises:
        ShapeError, InfeasibleError, NotConvergedError: as :func:`~difflayers.transport.sinkhorn`.

    Example:
        >>> import torch
        >>> from difflayers.transport import sinkhorn_divergence
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> shift = torch.tensor([0.3, 0.4])
        >>> sinkhorn_divergence(x, x + shift, epsilon=0.1).value        # a translation: its squared length
        tensor(0.2500)
    """
    check_clouds(x, y)
    if block_size is not None and marginal_penalty is not None:
        raise ValueError("block_size and marginal_penalty do not go together; leave one of them out")
    sides = [(x, y, a, b), (x, x, a, a), (y, y, b, b)]
    options: dict[str, Any] = {"epsilon": epsilon, "tol": tol, "max_iter": max_iter, "on_failure": on_failure}
    if block_size is not None:
        options |= {"cost": cost or "sqeuclidean", "block_size": None if block_size == "auto" else block_size}
        found = [sinkhorn_points(p, q, c, d, **options) for p, q, c, d in sides]
    elif marginal_penalty is None:
        found = [sinkhorn(_costs(cost, p, q), c, d, **options) for p, q, c, d in sides]
    else:
        options["marginal_penalty"] = marginal_penalty
        found = [sinkhorn(_relative(_costs(cost, p, q), c, d, epsilon), c, d, **options) for p, q, c, d in sides]
    return _together(found[0].dual_value - (found[1].dual_value + found[2].dual_value) / 2, found, on_failure)


def monge_gap(
    x: Tensor,
    mapped_x: Tensor,
    *,
    epsilon: float | Tensor,
    cost: Cost | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    on_failure: OnFailure = "raise",
) -> DivergenceSolution:
    """By how much a map costs more than the cheapest way to send its sample to its image, at the temperature ε.

    As a penalty it makes a map optimal without asking for a special architecture. The value is the published one (whose entropic cost
    subtracts the entropy of the plan) minus ε log n, a constant, so that it tends to zero for an optimal map.

    Args:
        x: ``(*batch, n, d)``, the sample.
        mapped_x: ``(*batch, n, d)``, where each point goes.
        epsilon: the temperature, in units of the cost.
        cost: ``(x, y) -> (*batch, n, m)``; None: squared Euclidean distances.
        tol: as in :func:`~difflayers.transport.sinkhorn`.
        max_iter: as in :func:`~difflayers.transport.sinkhorn`.
        on_failure: as in :func:`~difflayers.transport.sinkhorn`.

    Returns:
        :class:`DivergenceSolution`.

    Raises:
        ShapeError, NotConvergedError: as :func:`~difflayers.transport.sinkhorn`.

    Example:
        >>> import torch
        >>> from difflayers.transport import monge_gap
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> abs(monge_gap(x, 2 * x + 1, epsilon=0.01).value) < 1e-6     # increasing: optimal
        tensor(True)
        >>> monge_gap(x, -x, epsilon=0.01).value > 1                    # decreasing: the worst there is
        tensor(True)
    """
    check_clouds(x, mapped_x)
    if x.shape[-2] != mapped_x.shape[-2]:
        raise ShapeError(f"mapped_x must have a point for each of x: got {mapped_x.shape[-2]} and {x.shape[-2]}")
    costs = _guarded(cost)(x, mapped_x)
    found = sinkhorn(costs, epsilon=epsilon, tol=tol, max_iter=max_iter, on_failure=on_failure)
    temperature = epsilon.to(costs.dtype) if isinstance(epsilon, Tensor) else epsilon
    entropy = temperature * math.log(x.shape[-2])
    return _together(costs.diagonal(dim1=-2, dim2=-1).mean(-1) - found.dual_value - entropy, [found], on_failure)


def _costs(cost: Cost | None, p: Tensor, q: Tensor) -> Tensor:
    """The costs; those of a cloud with itself are symmetric to the last digit, which makes them easier to solve with."""
    costs = _guarded(cost)(p, q)
    return (costs + costs.mT) / 2 if p is q else costs


def _relative(cost: Tensor, a: Tensor | None, b: Tensor | None, epsilon: float | Tensor) -> Tensor:
    """cost − ε (log a ⊕ log b), whose entropy is relative to the product of the marginals."""
    n, m = cost.shape[-2:]
    a, b = (cost.new_full((size,), 1 / size) if part is None else part for part, size in ((a, n), (b, m)))
    left, right = (torch.where(part > 0, part, 1).log() for part in (a, b))
    temperature = epsilon.to(cost.dtype)[..., None, None] if isinstance(epsilon, Tensor) else epsilon
    return cost - temperature * (left.unsqueeze(-1) + right.unsqueeze(-2))


def _guarded(cost: Cost | None) -> Cost:
    """The cost, NaN for clouds that are not finite, to which no gradient flows: a derivative of the cost there would be 0 · NaN."""

    def guarded(x: Tensor, y: Tensor) -> Tensor:
        spoiled = []
        for cloud in (x, y):
            total = cloud.detach().sum((-1, -2))
            spoiled.append(torch.where(torch.isfinite(total), 0, torch.nan)[..., None, None])
        x, y = (torch.where(flag == 0, cloud, 0) for flag, cloud in zip(spoiled, (x, y), strict=True))
        return (squared_distances if cost is None else cost)(x, y) + (spoiled[0] + spoiled[1]).to(x.dtype)

    return guarded


def _together(value: Tensor, found: Sequence[TransportSolution] | Sequence[PointsSolution], on_failure: OnFailure) -> DivergenceSolution:
    status = found[-1].status
    for part in found[-2::-1]:
        status = torch.where(part.status != Status.SOLVED, part.status, status)
    if on_failure == "nan":
        value = torch.where(status != Status.SOLVED, torch.nan, value)
    errors, iterations = torch.broadcast_tensors(*(part.marginal_error for part in found)), [part.iterations for part in found]
    return DivergenceSolution(value, status, torch.stack(errors).amax(0), torch.stack(torch.broadcast_tensors(*iterations)).sum(0))
