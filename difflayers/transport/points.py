r"""Entropic transport between large point clouds: potentials and value without a plan, in memory O(n + m).

The problem is that of :mod:`~difflayers.transport.sinkhorn` with :math:`C_{ij} = c(x_i, y_j)`, computed in blocks of rows whenever it is
needed. The potentials are found by accelerated sweeps (:mod:`~difflayers.transport.cloud_sweeps`). The core differentiates the same
marginal equations in x, y, a, b and ε: their sums, and all derivatives of these, are evaluated in blocks
(:mod:`~difflayers.transport.blocks`), and the linear systems are solved by conjugate gradients with the Laplacian, one pass over the
blocks for a product. The gradient of the dual value takes one such pass, and no system (the envelope theorem).

With the potentials, the plan's conditional means extend to points outside of the clouds:

.. math:: T(p) = \sum_j w_j(p) \, y_j, \qquad w(p) = \operatorname{softmax}_j \big((g_j - c(p, y_j)) / ε\big).

References: Feydy et al., Interpolating between optimal transport and MMD using Sinkhorn divergences, AISTATS 2019, arXiv:1810.08278;
Pooladian and Niles-Weed, Entropic estimation of optimal transport maps, 2021, arXiv:2109.12004.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError
from ..implicit.closure import hoist, visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction
from ..solution import OnFailure
from .arguments import BALANCED, centred, check_clouds, cleaned, filled_where_lost, stopping, with_masses
from .blocks import blockwise
from .cloud_marginals import CloudDualValue, CloudMarginals, Means
from .cloud_sweeps import PairCost
from .costs import distances
from .marginals import Options

__all__ = ["CloudCost", "PointsSolution", "entropic_map", "sinkhorn_points"]

CloudCost = Literal["sqeuclidean", "euclidean"] | PairCost

# Entries of a block: 4 MB.
_ENTRIES = 2**19


class PointsSolution(NamedTuple):
    """What :func:`sinkhorn_points` returns; f, g and dual_value are differentiable.

    Attributes:
        f: ``(*batch, n)``, potentials of the points x; −inf where a is zero. As in
            :class:`~difflayers.transport.TransportSolution`, ⟨a, f⟩ = ⟨b, g⟩.
        g: ``(*batch, m)``, potentials of the points y.
        dual_value: ``(*batch,)``, ⟨a, f⟩ + ⟨b, g⟩ = ⟨P, C⟩ + ε Σ P log P of the plan P that is never formed.
        status: ``(*batch,)`` codes of :class:`~difflayers.Status`.
        marginal_error: ``(*batch,)``, the larger of ‖P 1 − a‖₁ and ‖Pᵀ 1 − b‖₁.
        iterations: ``(*batch,)`` int64, sweeps: passes over all pairs.
    """

    f: Tensor
    g: Tensor
    dual_value: Tensor
    status: Tensor
    marginal_error: Tensor
    iterations: Tensor


@eager
def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    cost: CloudCost = "sqeuclidean",
    block_size: int | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    on_failure: OnFailure = "raise",
) -> PointsSolution:
    """Entropic transport between clouds of thousands of points: what :func:`~difflayers.transport.sinkhorn` returns except for the plan.

    Neither the solve nor derivatives of any order hold more than some vectors of the clouds' sizes and some blocks of the cost matrix.
    Everything is computed in float64.

    Args:
        x: ``(*batch, n, d)``.
        y: ``(*batch, m, d)``.
        a: ``(*batch, n)``, masses of x, nonnegative. None: 1/n each.
        b: ``(*batch, m)``, masses of y, with the sum of a. None: 1/m each.
        epsilon: the temperature, a positive number in units of the cost or a tensor ``(*batch,)``, which is differentiated too.
        cost: "sqeuclidean", "euclidean", or a function ``(*batch, k, d), (*batch, m, d) -> (*batch, k, m)`` that treats each pair alone. It
            must not depend on other tensors that require gradients: pass the points through them before.
        block_size: points of x at a time. None: as many as make a block of 4 MB. Clouds that fit into one block are solved by the dense
            methods.
        tol: marginal error of a solved element, relative to the mass. None: 1e-10 (float64), 1e-6 (float32).
        max_iter: most sweeps at ε itself. None: 2000.
        on_failure: as in :func:`~difflayers.transport.sinkhorn`.

    Returns:
        :class:`PointsSolution`.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        InfeasibleError: a mass is negative, or the sums of the masses differ (``on_failure="raise"``).
        NotConvergedError: the marginals are not met, or an argument is not finite (``on_failure="raise"``).

    Example:
        >>> import torch
        >>> from difflayers.transport import sinkhorn_points
        >>> x = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        >>> found = sinkhorn_points(x, x.detach() + 0.5, epsilon=0.1)
        >>> torch.autograd.grad(found.dual_value, x)[0].mean(0) * 2000    # each point is pulled along the shift
        tensor([-1.0000, -1.0000, -1.0000])
    """
    pair_cost = _pair_cost(cost)
    batch, given = _validate(x, y, a, b, epsilon)
    dtype, n, m = x.dtype, x.shape[-2], y.shape[-2]
    block = _block_size(block_size, math.prod(batch) * m, x.shape[-1])
    if pair_cost is not None:
        _check_constants(pair_cost, x, y)
    options = Options("sinkhorn", stopping(tol, max_iter, dtype), max_iter, on_failure, BALANCED.get(dtype, 1e-2))
    x, y, a, b, eps, usable = cleaned(given)
    start = x.new_zeros(*batch, n + m)
    start, x, y, a, b, eps, usable = visible_to_modes([start, x, y, a, b, eps, usable])
    equations = CloudMarginals(len(batch), options, pair_cost, block)
    z, status, error, iterations = ImplicitFunction.apply(equations, start.detach(), x, a, b, eps, y, usable)
    dual = ImplicitFunction.apply(CloudDualValue(len(batch), pair_cost, block), start.detach()[..., :1], x, a, b, eps, y, z)[0].squeeze(-1)
    found = filled_where_lost([*centred(z, a, b), dual], status, on_failure)
    return PointsSolution(*(part.to(dtype) for part in found), status, error.to(dtype), iterations)


@eager
def entropic_map(
    points: Tensor,
    y: Tensor,
    g: Tensor,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    cost: CloudCost = "sqeuclidean",
    block_size: int | None = None,
) -> Tensor:
    """Where the plan sends points, also new ones: the mean of y under the conditional plan, T(p) = Σⱼ softmaxⱼ((gⱼ − c(p, yⱼ))/ε) yⱼ.

    At the points of the cloud itself this is the barycentric projection of the plan. As ε falls and the clouds grow it tends to the optimal
    map (squared distances).

    Args:
        points: ``(*batch, k, d)``, anywhere.
        y: ``(*batch, m, d)``, the target cloud.
        g: ``(*batch, m)``, its potentials, from :func:`sinkhorn_points` or :func:`~difflayers.transport.sinkhorn`.
        b: ``(*batch, m)``, masses: points without mass are left out. None: as g says, which is −inf there.
        epsilon: the temperature that g belongs to.
        cost: as in :func:`sinkhorn_points`.
        block_size: points at a time. None: as many as make a block of 4 MB.

    Returns:
        ``(*batch, k, d)``, differentiable in points, y, g and epsilon, in memory O(k + m).

    Example:
        >>> import torch
        >>> from difflayers.transport import entropic_map, sinkhorn_points
        >>> x = torch.linspace(0, 1, 200).unsqueeze(-1)
        >>> found = sinkhorn_points(x, 2 * x, epsilon=1e-3)
        >>> entropic_map(torch.tensor([[0.25], [0.5]]), 2 * x, found.g, epsilon=1e-3)
        tensor([[0.5000],
                [1.0000]])
    """
    pair_cost = _pair_cost(cost)
    _, (points, y, _, _, eps) = _validate(points, y, None, b, epsilon)
    if g.shape[-1] != y.shape[-2]:
        raise ShapeError(f"g must have the shape (*batch, {y.shape[-2]}) for points y {tuple(y.shape)}, got {tuple(g.shape)}")
    if pair_cost is not None:
        _check_constants(pair_cost, points, y)
    dtype = points.dtype
    points, y, g, eps = visible_to_modes([part.to(torch.float64) for part in (points, y, g, eps)])
    empty = torch.isneginf(g) if b is None else (b <= 0) | torch.isneginf(g)
    gamma = torch.where(empty, -torch.inf, torch.where(empty, 0, g) / eps.unsqueeze(-1))
    width = math.prod(torch.broadcast_shapes(points.shape[:-2], y.shape[:-2], g.shape[:-1], eps.shape)) * y.shape[-2]
    block = _block_size(block_size, width, points.shape[-1])
    others = [y, gamma.unsqueeze(-1), eps[..., None, None]]
    return blockwise(Means(pair_cost), [points], others, ([y.shape[-1]], []), block)[0][0].to(dtype)


def _pair_cost(cost: CloudCost) -> PairCost | None:
    if callable(cost):
        return cost
    if cost not in ("sqeuclidean", "euclidean"):
        raise ValueError(f"cost={cost!r} is not known; choose 'sqeuclidean', 'euclidean' or a function of two clouds")
    return distances if cost == "euclidean" else None


def _block_size(block_size: int | None, width: int, dim: int) -> int:
    """Rows of a block; ``width`` is what a row holds, over the whole batch."""
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    return block_size or max(_ENTRIES // max(width, 1), 1)


def _check_constants(cost: PairCost, x: Tensor, y: Tensor) -> None:
    """A gradient of a tensor that the cost closes over would silently be lost."""
    with torch.no_grad():
        probes = [part.detach()[..., :1, :] for part in (x, y)]
        captured = hoist(cost, *probes)[1]
    if any(tensor.requires_grad for tensor in captured):
        raise ValueError(
            "the cost closes over a tensor that requires a gradient, which would be lost; map the points before, or use sinkhorn"
        )


def _validate(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, epsilon: float | Tensor
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The batch shape, and all the arguments as tensors."""
    check_clouds(x, y)
    batch, masses = with_masses(x, (x.shape[-2], y.shape[-2]), [x.shape[:-2], y.shape[:-2]], a, b, epsilon, "epsilon")
    return batch, (x, y, *masses)
