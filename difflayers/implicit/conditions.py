r"""The catalog of optimality conditions: what a solution of an optimization problem satisfies, as residuals and maps.

Residuals (for ``implicit_root`` and ``custom_root``) vanish at a solution; maps (for ``implicit_fixed_point`` and
``custom_fixed_point``) keep it. Each takes objective functions ``fun(x, *args) -> scalar`` and gives back a function
``(x, *args)``. A batch is the sum of its elements' objectives, or a vmap.

Reference: Blondel et al., Efficient and Modular Implicit Differentiation, NeurIPS 2022, arXiv:2105.15183, table 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from ..pytree import Raveler

__all__ = [
    "block_proximal_gradient",
    "kkt",
    "mirror_descent",
    "newton",
    "projected_gradient",
    "proximal_gradient",
    "stationarity",
]

Objective = Callable[..., Tensor]


def stationarity(fun: Objective) -> Callable[..., Any]:
    """The residual ∇ₓ fun(x, args) of an unconstrained minimum.

    Args:
        fun: ``(x, *args) -> scalar``, twice differentiable in x.

    Returns:
        ``(x, *args) -> gradient``, with x's structure.

    Example:
        >>> import torch
        >>> from difflayers.implicit import conditions, implicit_root
        >>> X, y = torch.eye(2, dtype=torch.float64), torch.tensor([2.0, 4.0], dtype=torch.float64)
        >>> def ridge(w, weight):
        ...     return ((X @ w - y) ** 2).sum() / 2 + weight * (w**2).sum() / 2
        >>> fit = implicit_root(conditions.stationarity(ridge), symmetric=True)
        >>> torch.func.jacrev(lambda weight: fit(torch.zeros_like(y), weight))(torch.tensor(1.0, dtype=torch.float64))
        tensor([-0.5000, -1.0000], dtype=torch.float64)
    """
    return functools.partial(_stationarity, fun)


def _stationarity(fun: Objective, x: Any, *args: Any) -> Any:
    return torch.func.grad(fun)(x, *args)


def kkt(
    fun: Objective, equality: Callable[..., Tensor] | None = None, inequality: Callable[..., Tensor] | None = None
) -> Callable[..., tuple[Any, ...]]:
    r"""The Karush–Kuhn–Tucker residual of min fun(x) subject to equality(x) = 0, inequality(x) ≤ 0.

    .. math:: \nabla_x \bigl( f + y^T e + z^T g \bigr), \qquad e(x), \qquad \min(z, -g(x)).

    The last row is zero exactly when z ≥ 0, g ≤ 0 and zᵀg = 0. Its derivative follows the active set: where z > −g, the
    constraint's, else the multiplier's. It is the true derivative when no constraint is weakly active (z = g = 0).

    Args:
        fun: ``(x, *args) -> scalar``.
        equality: ``(x, *args) -> (p,)``, or None.
        inequality: ``(x, *args) -> (m,)``, or None.

    Returns:
        ``((x, y, z), *args) -> residual`` of the same structure, where y, z are present if their constraints are:
        ``(x,)``, ``(x, y)``, ``(x, z)`` or ``(x, y, z)``.

    Example:
        >>> import torch
        >>> from difflayers.implicit import conditions, custom_root
        >>> residual = conditions.kkt(lambda x, c: ((x - c) ** 2).sum() / 2, inequality=lambda x, c: x - 1)
        >>> @custom_root(residual)
        ... def solve(start, c):
        ...     x = c.clamp(max=1.0)
        ...     return x, c - x
        >>> torch.func.jacrev(lambda c: solve(None, c)[0])(torch.tensor([0.5, 2.0]))
        tensor([[1., 0.],
                [0., 0.]])
    """
    return functools.partial(_kkt, fun, equality, inequality)


def _kkt(
    fun: Objective,
    equality: Callable[..., Tensor] | None,
    inequality: Callable[..., Tensor] | None,
    solution: tuple[Any, ...],
    *args: Any,
) -> tuple[Any, ...]:
    x, *multipliers = solution
    constraints = [constraint for constraint in (equality, inequality) if constraint is not None]
    if len(multipliers) != len(constraints):
        raise ValueError(f"expected x and one multiplier for each of {len(constraints)} constraints, got {len(multipliers)} multipliers")

    def lagrangian(x: Any) -> Tensor:
        terms = [(multiplier * constraint(x, *args)).sum() for multiplier, constraint in zip(multipliers, constraints, strict=True)]
        return fun(x, *args) + sum(terms)

    rows: list[Any] = [torch.func.grad(lagrangian)(x)]
    if equality is not None:
        rows.append(equality(x, *args))
    if inequality is not None:
        slack, multiplier = -inequality(x, *args), multipliers[-1]
        rows.append(torch.where(multiplier > slack, slack, multiplier))
    return tuple(rows)


def proximal_gradient(fun: Objective, prox: Callable[..., Any], stepsize: float = 1.0) -> Callable[..., Any]:
    """The map T(x) = prox(x − s ∇fun(x)) that keeps the minimum of fun + g, for g with the proximal operator ``prox``.

    Args:
        fun: ``(x, *args) -> scalar``, the smooth part.
        prox: ``(x, prox_args, stepsize) -> x``.
        stepsize: s; any positive step has the same fixed points, a step below 2 / L makes T converge.

    Returns:
        ``(x, prox_args, *args) -> x``.

    Example:
        >>> import torch
        >>> from difflayers.implicit import conditions, implicit_fixed_point
        >>> soft_threshold = lambda x, weight, s: x.sign() * (x.abs() - s * weight).clamp(min=0)
        >>> lasso = implicit_fixed_point(
        ...     conditions.proximal_gradient(lambda x, y: ((x - y) ** 2).sum() / 2, soft_threshold, 0.5))
        >>> y = torch.tensor([3.0, 0.2], dtype=torch.float64)
        >>> weight = torch.tensor(1.0, dtype=torch.float64)
        >>> torch.func.jacrev(lambda weight: lasso(torch.zeros_like(y), weight, y))(weight)
        tensor([-1., 0.], dtype=torch.float64)
    """
    return functools.partial(_proximal_step, fun, prox, stepsize)


def _proximal_step(fun: Objective, prox: Callable[..., Any], stepsize: float, x: Any, prox_args: Any, *args: Any) -> Any:
    return prox(_descend(fun, x, args, stepsize), prox_args, stepsize)


def projected_gradient(fun: Objective, projection: Callable[..., Any], stepsize: float = 1.0) -> Callable[..., Any]:
    """The map T(x) = projection(x − s ∇fun(x)) that keeps the minimum of fun on a convex set.

    Args:
        fun: ``(x, *args) -> scalar``.
        projection: ``(x, projection_args) -> x``, the Euclidean projection on the set.
        stepsize: s, as in :func:`proximal_gradient`.

    Returns:
        ``(x, projection_args, *args) -> x``.

    Example:
        >>> import torch
        >>> from difflayers.implicit import conditions, implicit_fixed_point
        >>> box = implicit_fixed_point(
        ...     conditions.projected_gradient(lambda x, y: ((x - y) ** 2).sum(), lambda x, upper: x.minimum(upper), 0.25))
        >>> y = torch.tensor([0.3, 2.0], dtype=torch.float64)
        >>> torch.func.jacrev(lambda upper: box(torch.zeros_like(y), upper, y))(torch.ones_like(y))
        tensor([[0., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    return proximal_gradient(fun, functools.partial(_as_prox, projection), stepsize)


def _as_prox(projection: Callable[..., Any], x: Any, projection_args: Any, _: float) -> Any:
    return projection(x, projection_args)


def mirror_descent(
    fun: Objective, projection: Callable[..., Any], mirror: Callable[[Any], Any], stepsize: float = 1.0
) -> Callable[..., Any]:
    """The map T(x) = projection(mirror(x) − s ∇fun(x)) that keeps the minimum of fun, in the geometry of a mirror map.

    Args:
        fun: ``(x, *args) -> scalar``.
        projection: ``(dual, projection_args) -> x``, the Bregman projection from the dual space.
        mirror: ``x -> dual``, the gradient of the geometry's generating function (for the entropy: the logarithm).
        stepsize: s.

    Returns:
        ``(x, projection_args, *args) -> x``.

    Example:
        >>> import torch
        >>> from difflayers.implicit import conditions, implicit_fixed_point
        >>> def free_energy(x, cost):
        ...     return (x * cost).sum() + (x * x.log()).sum()
        >>> weights = implicit_fixed_point(
        ...     conditions.mirror_descent(free_energy, lambda dual, _: torch.softmax(dual, -1), torch.log, 0.5))
        >>> weights(torch.full((2,), 0.5, dtype=torch.float64), None, torch.tensor([0.0, 1.0], dtype=torch.float64))
        tensor([0.7311, 0.2689], dtype=torch.float64)
    """
    return functools.partial(_mirror_step, fun, projection, mirror, stepsize)


def _mirror_step(
    fun: Objective,
    projection: Callable[..., Any],
    mirror: Callable[[Any], Any],
    stepsize: float,
    x: Any,
    projection_args: Any,
    *args: Any,
) -> Any:
    gradient = torch.func.grad(fun)(x, *args)
    return projection(_pytree.tree_map(lambda dual, slope: dual - stepsize * slope, mirror(x), gradient), projection_args)


def newton(fun: Objective) -> Callable[..., Any]:
    """The map T(x) = x − (∇²fun(x))⁻¹ ∇fun(x) that keeps a stationary point of fun.

    Its derivative in x vanishes at the solution, so the implicit derivative needs no linear solve beyond T's own, and
    one step of "jfb" is exact to first order.

    Args:
        fun: ``(x, *args) -> scalar``, with a regular Hessian at the solution.

    Returns:
        ``(x, *args) -> x``.

    Example:
        >>> import torch
        >>> from difflayers.implicit import conditions, implicit_fixed_point
        >>> minimum = implicit_fixed_point(conditions.newton(lambda x, a: (x.exp() - a * x).sum()), "picard", backward="jfb")
        >>> a = torch.tensor([2.0], dtype=torch.float64)
        >>> torch.func.jacrev(lambda a: minimum(torch.zeros_like(a), a))(a)
        tensor([[0.5000]], dtype=torch.float64)
    """
    return functools.partial(_newton_step, fun)


def _newton_step(fun: Objective, x: Any, *args: Any) -> Any:
    from .linear_solve import linear_solve

    raveler = Raveler(x)
    row = raveler.ravel(x)
    gradient = torch.func.grad(lambda row: fun(raveler.unravel(row), *args))
    return raveler.unravel(row - linear_solve(torch.func.jacrev(gradient)(row), gradient(row), symmetric=True).x)


def block_proximal_gradient(fun: Objective, proxes: Sequence[Callable[..., Any]], stepsizes: Sequence[float]) -> Callable[..., Any]:
    """One sweep of proximal gradient steps over the blocks of x, each seeing the blocks before it updated.

    Args:
        fun: ``(x, *args) -> scalar`` of a tuple of blocks, smooth.
        proxes: one ``(block, prox_args, stepsize) -> block`` for each block.
        stepsizes: one step for each block.

    Returns:
        ``(x, prox_args, *args) -> x`` with ``prox_args`` a sequence, one entry for each block.

    Example:
        >>> import torch
        >>> from difflayers.implicit import conditions, implicit_fixed_point
        >>> keep, positive = (lambda x, _, s: x), (lambda x, _, s: x.clamp(min=0))
        >>> def loss(x, y):
        ...     return ((x[0] + x[1] - y) ** 2).sum() / 2 + (x[0] ** 2).sum() / 2
        >>> solve = implicit_fixed_point(conditions.block_proximal_gradient(loss, (keep, positive), (0.5, 1.0)))
        >>> y = torch.tensor([2.0, -2.0], dtype=torch.float64)
        >>> solve((torch.ones_like(y), torch.ones_like(y)), (None, None), y)[0].round(decimals=6) + 0.0
        tensor([ 0., -1.], dtype=torch.float64)
    """
    if len(proxes) != len(stepsizes):
        raise ValueError(f"expected one stepsize for each of {len(proxes)} proxes, got {len(stepsizes)}")

    return functools.partial(_sweep, fun, proxes, stepsizes)


def _sweep(
    fun: Objective,
    proxes: Sequence[Callable[..., Any]],
    stepsizes: Sequence[float],
    x: Sequence[Any],
    prox_args: Sequence[Any],
    *args: Any,
) -> tuple[Any, ...]:
    blocks = list(x)
    for i, (prox, stepsize) in enumerate(zip(proxes, stepsizes, strict=True)):

        def of_block(block: Any, i: int = i) -> Tensor:
            return fun((*blocks[:i], block, *blocks[i + 1 :]), *args)

        blocks[i] = prox(_descend(of_block, blocks[i], (), stepsize), prox_args[i], stepsize)
    return tuple(blocks)


def _descend(fun: Objective, x: Any, args: tuple[Any, ...], stepsize: float) -> Any:
    gradient = torch.func.grad(fun)(x, *args)
    return _pytree.tree_map(lambda value, slope: value - stepsize * slope, x, gradient)
