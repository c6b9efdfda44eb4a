"""Rows of all kinds, as tensors in the hands of the caller → their least-squares solution, differentiable in every one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from ..implicit.closure import Explicit, hoist, visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction, nan_free, nan_where_failed
from ..solution import Status
from .least_squares import Fit, FitOptions, LeastSquares, RowSystem
from .sharding import Slots
from .structured import Coupled, Free, LinearRows, PointRows, Structured, one_each

__all__ = ["FreeRows", "solve_rows"]


class FreeRows(NamedTuple):
    """Rows of no known structure.

    Attributes:
        function: ``(w, *args) -> (*batch, m)``.
        args: pytrees.
    """

    function: Callable[..., Tensor]
    args: tuple[Any, ...]


@eager
def solve_rows(
    x0: Tensor,
    points: Sequence[PointRows] = (),
    linear: Sequence[LinearRows] = (),
    free: FreeRows | None = None,
    *,
    options: FitOptions,
    coupling: LinearRows | None = None,
    slots: Slots | None = None,
) -> Fit:
    """The weights that minimize the sum of squares of all rows, differentiable in everything that the rows hold.

    Args:
        x0: ``(*batch, N)``, where to start, in the dtype to solve in. Its batch is that of all rows together.
        points: blocks of pointwise rows.
        linear: blocks of linear rows.
        free: rows of no known structure; with them the Jacobian is found by forward mode.
        options: how to solve.
        coupling: linear rows that tie the E problems of the last batch dimension together: L is ``(*batch, m, E·N)``, g ``(*batch, m)``,
            with x0 ``(*batch, E, N)``. They are one problem then, and share a status.
        slots: with ``coupling``, which of the E problems the other rows are of, in this process; ``x0`` and ``coupling`` are of all
            of them.

    Returns:
        :class:`~difflayers.pde.least_squares.Fit` with x like ``x0``.

    Raises:
        ShapeError: a function does not return one number for each point.
        DiffLayersError: a function is not pointwise.
        NotConvergedError, SingularError: some problem has no solution, with ``on_failure="raise"``.
    """
    functions = [block.function for block in points]
    data = [tuple(block[1:]) for block in points], [tuple(rows) for rows in linear], coupling and tuple(coupling), free and free.args
    leaves, spec = _pytree.tree_flatten(data)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in moving]

    def unflatten(theta: Sequence[Any]) -> Any:
        full = list(leaves)
        for i, tensor in zip(moving, theta[held:], strict=True):
            full[i] = tensor
        return _pytree.tree_unflatten(full, spec)

    def rows_of(theta: Sequence[Any]) -> tuple[list[PointRows], list[LinearRows]]:
        blocks, lines, _, _ = unflatten(theta)
        return [PointRows(function, *block) for function, block in zip(functions, blocks, strict=True)], [
            LinearRows(*line) for line in lines
        ]

    def pointwise(products: list[dict[str, Tensor]], args: list[tuple[Any, ...]]) -> list[Tensor]:
        return [one_each(function(z, *extra), z) for function, z, extra in zip(functions, products, args, strict=True)]

    seen: list[Explicit] = []
    captured: list[Tensor] = []
    slots = Slots(x0.shape[-2]) if coupling is not None and slots is None else slots
    single = x0 if coupling is None or slots is None else x0[..., slots.own, :]
    if points:
        start = [{name: (T.to(x0.dtype) @ single.unsqueeze(-1)).squeeze(-1) for name, T in block.features.items()} for block in points]
        everything_that_is_called = functools.partial(pointwise, *functions)
        explicit, captured, _ = hoist(pointwise, start, [block.args for block in points], of=everything_that_is_called)
        seen.append(explicit)
    split = len(captured)
    system: RowSystem = Structured(lambda theta, z, args: seen[0](theta[:split], z, args), rows_of, split)
    if free is not None:
        unknown, more, _ = hoist(free.function, single, *free.args)
        seen.append(unknown)
        captured = captured + more
        system = Free(lambda w, *theta: unknown(theta[split:held], w, *unflatten(theta)[3]), system)
    held = len(captured)
    start = x0
    if coupling is not None and slots is not None:
        system, start = Coupled(system, slots, lambda theta: LinearRows(*unflatten(theta)[2])), x0.flatten(-2)

    problem = LeastSquares(system, options, batch_ndim=start.dim() - 1, seen=seen)
    start, *theta = visible_to_modes([start.detach(), *captured, *tensors])
    lost = None
    if options.on_failure == "nan":
        with torch.no_grad():
            lost = ~torch.isfinite(system.rows(start, *theta)).all(-1)
        theta = nan_free(theta, lost)
    fit = Fit(*ImplicitFunction.apply(problem, start, *theta))
    if lost is not None:
        fit = fit._replace(status=torch.where(lost, int(Status.NUMERICAL_ERROR), fit.status))
    # The Function keeps its output for the derivatives; the caller's copy may be modified in place.
    return fit._replace(x=nan_where_failed(fit, options.on_failure).reshape(x0.shape).clone())  # ty: ignore[invalid-argument-type]
