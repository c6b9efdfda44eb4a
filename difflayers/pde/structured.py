r"""Rows whose Jacobian needs no differentiation: functions of each point's own products, and linear rows.

Let T₁, …, T_K be features of the basis functions at P points, each a matrix of shape P × N (their values, their derivatives, …), and
z_k = T_k w the products with the weights. A residual that is **pointwise** in them, ρ_p = ρ(z_{1p}, …, z_{Kp}), has

.. math::

    J = \sum_k \operatorname{diag}(ρ_k) T_k, \qquad
    J^T r = \sum_k T_k^T (ρ ρ_k), \qquad
    A = \sum_{k,l} T_k^T \operatorname{diag}(ρ_k ρ_l + ρ ρ_{kl}) T_l

with the partial derivatives ρ_k = ∂ρ/∂z_k, ρ_kl, which one pass back through ρ, and K passes forward through that, give for all points at
once. Nothing depends on the number N of basis functions but the matrix products. Forward mode through the residual would take N passes.

Linear rows r = Lw − g (boundary values, conservation laws, couplings, a ridge) have J = L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

from ..errors import DiffLayersError, ShapeError
from ..solvers.linearize import jvp, vjp
from .least_squares import RowSystem
from .sharding import Slots

__all__ = ["Coupled", "Free", "LinearRows", "PointRows", "Structured"]

Split = Callable[[Sequence[Any]], Any]


class PointRows(NamedTuple):
    """Rows that are a pointwise function of products.

    Attributes:
        function: ``(products, *args) -> (*batch, P)``, with products the dict of ``(*batch, P)``.
        features: T_k by name, each ``(*batch, P, N)``.
        args: pytrees, given to ``function`` as they are.
        weight: multiplies the rows, broadcasts against ``(*batch, P)``; None is 1. A point of weight 0 is not there.
    """

    function: Callable[..., Tensor]
    features: dict[str, Tensor]
    args: tuple[Any, ...] = ()
    weight: Tensor | None = None


class LinearRows(NamedTuple):
    """The rows Lw − g.

    Attributes:
        matrix: L, ``(*batch, m, N)``.
        target: g, broadcasts against ``(*batch, m)``.
    """

    matrix: Tensor
    target: Tensor

    def at(self, w: Tensor) -> Tensor:
        """Lw − g."""
        return _times(self.matrix, w) - self.target


class Structured(RowSystem):
    """Pointwise rows, then linear ones.

    Args:
        functions: ``(θ, products of each block, args of each block) -> rows of each block``.
        split: θ -> (blocks of :class:`PointRows`, blocks of :class:`LinearRows`).
    """

    def __init__(self, functions: Callable[..., list[Tensor]], split: Split) -> None:
        self.functions, self.split = functions, split

    def rows(self, w: Tensor, *theta: Any) -> Tensor:
        """ρ of every block, times its weight, then Lw − g."""
        points, linear = self.split(theta)
        rho = [self._rho(points, theta)(_products(points, w))] if points else []
        return torch.cat([*rho, *(_spread(rows.at(w), w) for rows in linear)], -1)

    def gradient(self, w: Tensor, *theta: Any) -> Tensor:
        """Σ T_kᵀ (ρ ρ_k) + Lᵀ(Lw − g)."""
        points, linear = self.split(theta)
        products = _products(points, w)
        rho, pullback = vjp(self._rho(points, theta), products)
        return _assemble(points, linear, w, pullback(rho)[0])

    def normal_equations(self, w: Tensor, *theta: Any) -> tuple[Tensor, Tensor]:
        """JᵀJ and Jᵀr from the features."""
        points, linear = self.split(theta)
        products = _products(points, w)
        rho, pullback = vjp(self._rho(points, theta), products)
        return self._gram(points, linear, w, pullback(torch.ones_like(rho))[0]), _assemble(points, linear, w, pullback(rho)[0])

    def hessian(self, w: Tensor, *theta: Any) -> Tensor:
        """JᵀJ, and Σ T_kᵀ (ρ ρ_kl) T_l where that is not zero."""
        points, linear = self.split(theta)
        products, function = _products(points, w), self._rho(points, theta)
        rho, pullback = vjp(function, products)
        matrix = self._gram(points, linear, w, pullback(torch.ones_like(rho))[0])
        for j in range(max((len(block.features) for block in points), default=0)):
            along = _cat([_direction(j, block, w) for block in points])
            # The derivative of ρ ρ_k along z_l, with its factor ρ held.
            curvature = jvp(lambda z: vjp(function, z)[1](rho)[0], (products,), (along,))[1]
            for block, pieces in zip(points, _pieces(points, curvature), strict=True):
                terms = [(pieces[name], T) for name, T in block.features.items() if _may_matter(pieces[name])]
                if j < len(block.features) and terms:
                    left = sum((c.unsqueeze(-1) * T.to(w.dtype) for c, T in terms), torch.zeros_like(w[..., None, :]))
                    matrix = matrix + left.mT @ list(block.features.values())[j].to(w.dtype)
        return matrix

    def check(self, w: Tensor, theta: Sequence[Any]) -> None:
        """Refuse functions that mix points: their derivative along a direction is not that of each point on its own."""
        points, _ = self.split(theta)
        products, function = _products(points, w), self._rho(points, theta)
        direction = torch.cos(torch.arange(products.shape[-1], device=w.device) ** 2 + 1.0).to(w.dtype).expand_as(products)
        rho, derivative = jvp(function, (products,), (direction,))
        slopes = vjp(function, products)[1](torch.ones_like(rho))[0]
        alone = [sum(pieces.values(), torch.zeros_like(w[..., :1])) for pieces in _pieces(points, slopes * direction)]
        off = (derivative - _cat(alone)).abs()
        if bool((off > 1e3 * torch.finfo(w.dtype).eps ** 0.75 * derivative.abs().amax(-1, keepdim=True)).any()):
            raise DiffLayersError(
                "with features= the residual must be pointwise, each row a function of the products at its own point: this one mixes "
                "points (a derivative, a mean, a sum over them?). Move what is linear in the solution into features=, or leave them out"
            )

    def _rho(self, points: Sequence[PointRows], theta: Sequence[Any]) -> Callable[[Tensor], Tensor]:
        def weighted(products: Tensor) -> Tensor:
            rows = self.functions(theta, _pieces(points, products), [block.args for block in points])
            rows = [rho if block.weight is None else rho * block.weight for rho, block in zip(rows, points, strict=True)]
            return _cat([rho.to(products.dtype) for rho in rows])

        return weighted

    def _gram(self, points: Sequence[PointRows], linear: Sequence[LinearRows], w: Tensor, slopes: Tensor) -> Tensor:
        gram = torch.zeros_like(w[..., None] * w[..., None, :])
        for block, pieces in zip(points, _pieces(points, slopes), strict=True):
            terms = [pieces[name].unsqueeze(-1) * T.to(w.dtype) for name, T in block.features.items()]
            jacobian = sum(terms[1:], terms[0])
            gram = gram + jacobian.mT @ jacobian
        for rows in linear:
            matrix = rows.matrix.to(w.dtype)
            gram = gram + matrix.mT @ matrix
        return gram


class Free(RowSystem):
    """Rows of no known structure, then those of another system. Forward mode gives their Jacobian.

    Args:
        function: ``(w, *theta) -> (*batch, m)``.
        others: the rest of the rows.
    """

    def __init__(self, function: Callable[..., Tensor], others: RowSystem) -> None:
        self.function, self.others = function, others

    def rows(self, w: Tensor, *theta: Any) -> Tensor:
        """Both, one behind the other."""
        return torch.cat([_spread(self.function(w, *theta), w), self.others.rows(w, *theta)], -1)


class Coupled(RowSystem):
    """E problems of N unknowns that linear rows make one problem of E·N unknowns; the Hessian is block-diagonal but for those rows.

    Args:
        inner: the system of the single problems, on ``(*batch, E, N)``.
        slots: E, and which of the problems this process has the rows of; what it finds of them it shares with the others.
        split: θ -> the :class:`LinearRows` with L ``(*batch, m, E·N)``, which every process has.
    """

    def __init__(self, inner: RowSystem, slots: Slots, split: Split) -> None:
        self.inner, self.slots, self.split = inner, slots, split

    def rows(self, w: Tensor, *theta: Any) -> Tensor:
        """The rows of every problem, then those between them."""
        single = self.slots.gather(self.inner.rows(self._apart(w), *theta))
        return torch.cat([single.flatten(-2), _spread(self.split(theta).at(w), w)], -1)

    def gradient(self, w: Tensor, *theta: Any) -> Tensor:
        """Jᵀr."""
        between = self.split(theta)
        single = self.slots.gather(self.inner.gradient(self._apart(w), *theta))
        return single.flatten(-2) + _times(between.matrix.mT, between.at(w))

    def normal_equations(self, w: Tensor, *theta: Any) -> tuple[Tensor, Tensor]:
        """JᵀJ and Jᵀr."""
        gram, gradient = self.inner.normal_equations(self._apart(w), *theta)
        between = self.split(theta)
        gradient = self.slots.gather(gradient).flatten(-2) + _times(between.matrix.mT, between.at(w))
        return self._together(gram, between, w), gradient

    def hessian(self, w: Tensor, *theta: Any) -> Tensor:
        """The blocks, and LᵀL."""
        return self._together(self.inner.hessian(self._apart(w), *theta), self.split(theta), w)

    def check(self, w: Tensor, theta: Sequence[Any]) -> None:
        """That of the single problems."""
        self.inner.check(self._apart(w), theta)

    def _apart(self, w: Tensor) -> Tensor:
        return w.unflatten(-1, (self.slots.count, -1))[..., self.slots.own, :]

    def _together(self, blocks: Tensor, between: LinearRows, w: Tensor) -> Tensor:
        matrix, shape = between.matrix.to(w.dtype), blocks.shape[-2:]
        blocks = self.slots.gather(blocks.flatten(-2)).unflatten(-1, shape)
        # (*batch, E, N, N) -> (*batch, N, N, E) -> (*batch, E, N, E, N)
        diagonal = torch.diag_embed(blocks.movedim(-3, -1), dim1=-4, dim2=-2)
        return diagonal.flatten(-4, -3).flatten(-2) + matrix.mT @ matrix


def _times(matrix: Tensor, w: Tensor) -> Tensor:
    return (matrix.to(w.dtype) @ w.unsqueeze(-1)).squeeze(-1)


def _spread(rows: Tensor, w: Tensor) -> Tensor:
    return rows.expand(*w.shape[:-1], rows.shape[-1])


def _cat(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows, -1)


def _products(points: Sequence[PointRows], w: Tensor) -> Tensor:
    """All products of all blocks, one behind the other, ``(*batch, ΣK·P)``."""
    return _cat([_spread(_times(T, w), w) for block in points for T in block.features.values()])


def _pieces(points: Sequence[PointRows], products: Tensor) -> list[dict[str, Tensor]]:
    """The dict of each block, of what :func:`_products` returned."""
    sizes = [T.shape[-2] for block in points for T in block.features.values()]
    pieces = iter(products.split(sizes, -1))
    return [{name: next(pieces) for name in block.features} for block in points]


def _direction(j: int, block: PointRows, w: Tensor) -> Tensor:
    """Ones in the j-th product of a block."""
    sizes = [T.shape[-2] for T in block.features.values()]
    return torch.cat([torch.full((*w.shape[:-1], size), float(i == j), dtype=w.dtype, device=w.device) for i, size in enumerate(sizes)], -1)


def _assemble(points: Sequence[PointRows], linear: Sequence[LinearRows], w: Tensor, cotangent: Tensor) -> Tensor:
    """Σ T_kᵀ c_k of all blocks, and Lᵀ(Lw − g)."""
    total = torch.zeros_like(w)
    for block, pieces in zip(points, _pieces(points, cotangent), strict=True):
        for name, T in block.features.items():
            total = total + _times(T.mT, pieces[name])
    for rows in linear:
        total = total + _times(rows.matrix.mT, rows.at(w))
    return total


def _may_matter(values: Tensor) -> bool:
    """Whether some entry is not zero; a batched tensor cannot be asked."""
    return _functorch.is_functorch_wrapped_tensor(values) or bool((values != 0).any())


def one_each(rho: Any, products: dict[str, Tensor]) -> Tensor:
    """Refuse rows that are not one number for each point."""
    points = next(iter(products.values())).shape
    if not isinstance(rho, Tensor) or rho.shape[-1:] != points[-1:] or rho.dim() > len(points):
        came = tuple(rho.shape) if isinstance(rho, Tensor) else type(rho).__name__
        raise ShapeError(f"with features= the residual must return one number for each point, {tuple(points)}, got {came}")
    return rho.expand(points)
