r"""The rows of a hard constraint, by type.

| | the rows | |
|---|---|---|
| :func:`pde` | ρ(products, \*args) at the points of a region | pointwise, may be nonlinear |
| :func:`initial` | u − g at the first point of a dimension | |
| :func:`dirichlet` | u − g on a side | |
| :func:`neumann` | ∂u/∂n − g on a side, n the outward normal | |
| :func:`robin` | a u + b ∂u/∂n − g on a side | |
| :func:`periodic` | u on one side − u on the other, and so for ∂u/∂x | |
| :func:`integral` | Σ quadrature weights · u − g | |

All but the first are linear in u, so in the weights: they are assembled once for each solve. A row is multiplied by its ``weight`` before
it is squared; how to choose it is on the page "Choosing points and rows".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..errors import ShapeError
from ..holding import hold
from .finite_difference import Side, edge_derivative
from .structured import LinearRows, PointRows

__all__ = ["BoundaryRows", "InteriorRows", "dirichlet", "initial", "integral", "neumann", "pde", "periodic", "robin"]

Value = float | Tensor | Callable[..., Tensor | float]
Region = tuple[slice | int, ...]


def pde(
    residual_fn: Callable[..., Tensor],
    features: Callable[..., dict[str, Tensor]] | None = None,
    *,
    region: Region | None = None,
    weight: float | Tensor = 1.0,
) -> InteriorRows:
    """The equation itself, or one of several; also a boundary condition that is not linear.

    Args:
        residual_fn: ``(products, *args) -> (*batch, P)``, pointwise.
        features: ``(basis, *args) -> dict`` of ``(*batch, *grid, N)``; None takes those of the constraint.
        region: slices of the grid's dimensions: the points where it holds; None is everywhere.
        weight: of the rows; a tensor broadcasts against the grid.

    Example:
        >>> from difflayers.pde import pde
        >>> pde(lambda z: z["u_t"] - z["u_xx"], region=(slice(1, None), slice(1, -1)))
        InteriorRows(region=(slice(1, None, None), slice(1, -1, None)), weight=1.0)
    """
    return InteriorRows(residual_fn, features, region, weight)


def initial(value: Value, *, dim: int = 0, relative: bool = False, weight: float | Tensor = 1.0) -> BoundaryRows:
    """u is ``value`` where the dimension of time begins.

    Args:
        value: a number, a tensor ``(*batch, *rest of the grid)``, or a function of the constraint's ``*args`` that returns one.
        dim: of time, among the grid's.
        relative: divide each row by its value, which must not be zero.
        weight: of the rows.

    Example:
        >>> from difflayers.pde import initial
        >>> initial(lambda u0: u0, relative=True)
        BoundaryRows(initial, dim=0, relative=True, weight=1.0)
    """
    return BoundaryRows("initial", _values, dim, value, weight, relative=relative)


def dirichlet(value: Value, *, dim: int, side: Side = "lower", weight: float | Tensor = 1.0) -> BoundaryRows:
    """u is ``value`` on a side of the mesh.

    Args:
        value: as in :func:`initial`.
        dim: of the side, among the grid's.
        side: "lower" or "upper".
        weight: of the rows.
    """
    return BoundaryRows("dirichlet", _values, dim, value, weight, side=side)


def neumann(value: Value, spacing: float | Tensor, *, dim: int, side: Side = "lower", weight: float | Tensor = 1.0) -> BoundaryRows:
    """The outward normal derivative of u is ``value`` on a side of the mesh.

    Args:
        value: as in :func:`initial`.
        spacing: of the mesh along ``dim``, or its coordinates.
        dim: of the side, among the grid's.
        side: "lower" or "upper".
        weight: of the rows.
    """
    return BoundaryRows("neumann", _normal_derivative, dim, value, weight, side=side, spacing=spacing)


def robin(
    value: Value,
    spacing: float | Tensor,
    *,
    dim: int,
    side: Side = "lower",
    a: float | Tensor = 1.0,
    b: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
) -> BoundaryRows:
    """a u + b ∂u/∂n is ``value`` on a side of the mesh, n the outward normal.

    Args:
        value: as in :func:`initial`.
        spacing: of the mesh along ``dim``, or its coordinates.
        dim: of the side, among the grid's.
        side: "lower" or "upper".
        a: of u.
        b: of the normal derivative.
        weight: of the rows.
    """
    return BoundaryRows("robin", _mixed, dim, value, weight, side=side, spacing=spacing, a=a, b=b)


def periodic(*, dim: int, spacing: float | Tensor | None = None, weight: float | Tensor = 1.0) -> BoundaryRows:
    """u is the same on both sides of a dimension, on a mesh that holds both ends of the period.

    Args:
        dim: of the sides, among the grid's.
        spacing: of the mesh along ``dim``, or its coordinates: then ∂u/∂x is the same, too.
        weight: of the rows.
    """
    return BoundaryRows("periodic", _jumps, dim, 0.0, weight, spacing=spacing)


def integral(value: Value, weights: Tensor, *, dims: int | Sequence[int], weight: float | Tensor = 1.0) -> BoundaryRows:
    """A weighted sum of u over some dimensions is ``value``, at each point of the others.

    Args:
        value: as in :func:`initial`, with the shape of the dimensions that stay.
        weights: of the quadrature, with the shape of the dimensions that are summed over, in their order.
        dims: these dimensions, among the grid's.
        weight: of the rows.
    """
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    return BoundaryRows("integral", _sums, 0, value, weight, dims=dims, weights=weights)


class InteriorRows(nn.Module):
    """What :func:`pde` returns."""

    features: Callable[..., dict[str, Tensor]] | None
    weight: float | Tensor

    def __init__(
        self,
        residual_fn: Callable[..., Tensor],
        features: Callable[..., dict[str, Tensor]] | None,
        region: Region | None,
        weight: float | Tensor,
    ) -> None:
        super().__init__()
        self.residual_fn, self.features, self.region = residual_fn, features, region
        hold(self, "weight", weight)

    def forward(self, features: dict[str, Tensor], grid: tuple[int, ...], *args: Any) -> PointRows:
        """The rows at all points of the region.

        Args:
            features: each ``(*batch, *grid, N)``.
            grid: its shape.
            args: of the constraint; those with the grid's shape are flattened like the features.
        """
        if not isinstance(features, dict) or not features:
            raise ShapeError(f"features must return a dict of tensors (*batch, *grid, N), got {type(features).__name__}")
        for name, T in features.items():
            if T.dim() <= len(grid) or tuple(T.shape[-1 - len(grid) : -1]) != grid:
                raise ShapeError(f"feature {name!r} must be (*batch, *grid, N) with the grid {grid}, got {tuple(T.shape)}")
        weight = self.weight
        if isinstance(weight, Tensor) and weight.dim():
            weight = on_points(weight, grid, self.region)
        elif not isinstance(weight, Tensor):
            weight = None if weight == 1 else torch.as_tensor(weight, dtype=next(iter(features.values())).dtype)
        return PointRows(
            self.residual_fn,
            {name: _points(T.movedim(-1, 0), grid, self.region).movedim(0, -1) for name, T in features.items()},
            _pytree.tree_map(lambda leaf: on_points(leaf, grid, self.region), args),
            weight,
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"region={self.region}, weight={_shown(self.weight)}"


class BoundaryRows(nn.Module):
    """What the functions for linear rows return."""

    value: Value
    weight: float | Tensor
    spacing: Any
    a: Any
    b: Any
    dims: tuple[int, ...]
    weights: Tensor

    def __init__(
        self,
        kind: str,
        operator: Callable[[BoundaryRows, Tensor, int], Tensor],
        dim: int,
        value: Value,
        weight: float | Tensor,
        *,
        relative: bool = False,
        side: Side = "lower",
        **data: Any,
    ) -> None:
        super().__init__()
        if side not in ("lower", "upper"):
            raise ValueError(f"side={side!r} is not known; choose 'lower' or 'upper'")
        self.kind, self.operator, self.dim, self.relative, self.side = kind, operator, dim, relative, side
        for name, tensor_or_number in ({"value": value, "weight": weight} | data).items():
            hold(self, name, tensor_or_number)

    def forward(self, basis: Tensor, grid_ndim: int, *args: Any) -> LinearRows:
        """The rows for each basis function.

        Args:
            basis: ``(*batch, *grid, N)``.
            grid_ndim: dimensions of the grid.
            args: of the constraint.
        """
        first = basis.dim() - 1 - grid_ndim
        if not -grid_ndim <= self.dim < grid_ndim:
            raise ShapeError(f"{self.kind} rows are for dimension {self.dim}, the grid has {grid_ndim}")
        matrix = self.operator(self, basis, first + self.dim % grid_ndim)
        value = self.value(*args) if callable(self.value) and not isinstance(self.value, Tensor) else self.value
        target = torch.as_tensor(value, dtype=basis.dtype, device=basis.device)
        shape = matrix.shape[first:-1]
        try:
            target = target.expand(*target.shape[: max(target.dim() - len(shape), 0)], *shape) if shape else target
        except RuntimeError:
            raise ShapeError(
                f"the value of {self.kind} rows must be (*batch, {', '.join(map(str, shape))}), got {tuple(target.shape)}"
            ) from None
        if shape:
            matrix, target = matrix.flatten(first, -2), target.flatten(target.dim() - len(shape))
        else:
            matrix, target = matrix.unsqueeze(-2), target.unsqueeze(-1)
        if self.relative:
            matrix, target = matrix / target.unsqueeze(-1), torch.ones_like(target)
        return LinearRows(matrix * self.weight, target * self.weight)

    def extra_repr(self) -> str:
        """The options."""
        side = f", side={self.side!r}" if self.kind in ("dirichlet", "neumann", "robin") else ""
        relative = ", relative=True" if self.relative else ""
        return f"{self.kind}, dim={self.dim}{side}{relative}, weight={_shown(self.weight)}"


def on_points(arg: Any, grid: tuple[int, ...], region: Region | None = None) -> Any:
    """A tensor whose last dimensions broadcast against the grid, at the points of a region, ``(*lead, P)``; anything else as it is.

    Args:
        arg: anything.
        grid: the shape of the grid.
        region: slices of its dimensions; None is all of it.
    """
    if (
        not isinstance(arg, Tensor)
        or arg.dim() < len(grid)
        or any(size not in (1, n) for size, n in zip(arg.shape[-len(grid) :], grid, strict=True))
    ):
        return arg
    return _points(arg.expand(*arg.shape[: arg.dim() - len(grid)], *grid), grid, region)


def _points(values: Tensor, grid: tuple[int, ...], region: Region | None) -> Tensor:
    lead = values.dim() - len(grid)
    if region is not None:
        values = values[(slice(None),) * lead + tuple(region)]
    return values.reshape(*values.shape[:lead], math.prod(values.shape[lead:]))


def _values(rows: BoundaryRows, basis: Tensor, at: int) -> Tensor:
    return basis.select(at, 0 if rows.side == "lower" else -1)


def _normal_derivative(rows: BoundaryRows, basis: Tensor, at: int) -> Tensor:
    slope = edge_derivative(basis, rows.spacing, dim=at, side=rows.side)
    return -slope if rows.side == "lower" else slope


def _mixed(rows: BoundaryRows, basis: Tensor, at: int) -> Tensor:
    return rows.a * _values(rows, basis, at) + rows.b * _normal_derivative(rows, basis, at)


def _jumps(rows: BoundaryRows, basis: Tensor, at: int) -> Tensor:
    jumps = [basis.select(at, 0) - basis.select(at, -1)]
    if rows.spacing is not None:
        lower, upper = (edge_derivative(basis, rows.spacing, dim=at, side=side) for side in ("lower", "upper"))
        jumps.append(lower - upper)
    return torch.stack(jumps, -2)


def _sums(rows: BoundaryRows, basis: Tensor, first: int) -> Tensor:
    at = [first + dim for dim in rows.dims]
    if tuple(rows.weights.shape) != tuple(basis.shape[dim] for dim in at):
        raise ShapeError(f"the weights of an integral must have the shape of the dimensions {rows.dims}, got {tuple(rows.weights.shape)}")
    moved = basis.movedim(at, tuple(range(-1 - len(at), -1)))
    return (moved * rows.weights.to(basis).unsqueeze(-1)).flatten(-1 - len(at), -2).sum(-2)


def _shown(weight: Any) -> Any:
    return f"{tuple(weight.shape)} tensor" if isinstance(weight, Tensor) and weight.dim() else float(weight)
