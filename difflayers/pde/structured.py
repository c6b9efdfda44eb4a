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
from torch.utils import _pytree

from ..errors import DiffLayersError, ShapeError
from ..solvers.linearize import vjp
from .least_squares import RowSystem
from .sharding import Slots

__all__ = ["Coupled", "Free", "LinearRows", "PointRows", "Structured"]

_MIXES = (
    "with features= the residual must be pointwise, each row a function of the products at its own point: this one mixes points "
    "(a derivative, a mean, a sum over them?). Move what is linear in the solution into features=, or leave them out"
)

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
        closed_over: how many tensors at the beginning of θ the functions close over.
    """

    def __init__(self, functions: Callable[..., list[Tensor]], split: Split, closed_over: int = 0) -> None:
        self.functions, self.split, self.closed_over = functions, split, closed_over

    def rows(self, w: Tensor, *theta: Any) -> Tensor:
        """ρ of every block, times its weight, then Lw − g."""
        points, linear = self.split(theta)
        rho = self._rho(points, theta)(_products(points, w))
        return torch.cat([rho, *(_spread(rows.at(w), w) for rows in linear)], -1)

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
        return _normal_equations(points, linear, w, rho, pullback(torch.ones_like(rho))[0])

    def hessian(self, w: Tensor, *theta: Any) -> Tensor:
        """JᵀJ, and Σ T_kᵀ (ρ ρ_kl) T_l where that is not zero."""
        points, linear = self.split(theta)
        products, function = _products(points, w), self._rho(points, theta)
        rho, pullback = vjp(function, products)
        matrix, _ = _normal_equations(points, linear, w, rho, pullback(torch.ones_like(rho))[0])
        # ρ ρ_k with its factor ρ held; its pullback of the ones of one k gives ρ ρ_kl for every l.
        _, curvature = vjp(lambda z: vjp(function, z)[1](rho)[0], products)
        for j in range(max((len(block.features) for block in points), default=0)):
            along = _cat([_direction(j, block, w) for block in points])
            for block, pieces in zip(points, _pieces(points, curvature(along)[0]), strict=True):
                matrix = _with_curvature(matrix, j, list(block.features.values()), list(pieces.values()))
        return matrix

    def check(self, w: Tensor, theta: Sequence[Any]) -> None:
        """Refuse functions that mix points: what they pull back to a point depends on the cotangents of others."""
        points, _ = self.split(theta)
        products = _products(points, w)
        rho, pullback = vjp(self._rho(points, theta), products)
        direction = torch.cos(torch.arange(rho.shape[-1], device=w.device) ** 2 + 1.0).to(w.dtype).expand_as(rho)
        slopes, pulled = (_pieces(points, pullback(cotangent)[0]) for cotangent in (torch.ones_like(rho), direction))
        for block, ones, others, along in zip(points, slopes, pulled, _split(points, direction), strict=True):
            for name in block.features:
                off = (others[name] - along * ones[name]).abs()
                if bool((off > 1e3 * torch.finfo(w.dtype).eps ** 0.75 * ones[name].abs().amax(-1, keepdim=True)).any()):
                    raise DiffLayersError(_MIXES)

    def select(self, theta: Sequence[Any], which: Tensor) -> RowSystem | None:
        """Some of the problems, if it is plain for every tensor whether it has their batch dimensions."""
        points, linear = self.split(theta)
        others = list(theta[: self.closed_over])
        for block in points:
            count = next(iter(block.features.values())).shape[-2]
            others += [leaf for leaf in _pytree.tree_leaves(block.args) if isinstance(leaf, Tensor) and leaf.shape[-1:] != (count,)]
        if not which.dim() or any(leaf.numel() > 1 for leaf in others):
            return None

        def pick(leaf: Any, core: int) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() <= core:
                return leaf
            return leaf.expand(*which.shape, *leaf.shape[leaf.dim() - core :])[which]

        blocks = [
            PointRows(
                block.function,
                {name: pick(T, 2) for name, T in block.features.items()},
                _pytree.tree_map(lambda leaf: pick(leaf, 1), block.args),
                pick(block.weight, 1),
            )
            for block in points
        ]
        lines = [LinearRows(pick(rows.matrix, 2), pick(rows.target, 1)) for rows in linear]
        return Structured(lambda _, z, args: self.functions(theta, z, args), lambda _: (blocks, lines))

    def _rho(self, points: Sequence[PointRows], theta: Sequence[Any]) -> Callable[[Tensor], Tensor]:
        def weighted(products: Tensor) -> Tensor:
            if not points:
                return products
            rows = self.functions(theta, _pieces(points, products), [block.args for block in points])
            rows = [rho if block.weight is None else rho * block.weight for rho, block in zip(rows, points, strict=True)]
            return _cat([rho.to(products.dtype) for rho in rows])

        return weighted


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
    return _cat([_spread(_times(T, w), w) for block in points for T in block.features.values()]) if points else w[..., :0]


def _pieces(points: Sequence[PointRows], products: Tensor) -> list[dict[str, Tensor]]:
    """The dict of each block, of what :func:`_products` returned."""
    sizes = [T.shape[-2] for block in points for T in block.features.values()]
    pieces = iter(products.split(sizes, -1))
    return [{name: next(pieces) for name in block.features} for block in points]


def _direction(j: int, block: PointRows, w: Tensor) -> Tensor:
    """Ones in the j-th product of a block."""
    sizes = [T.shape[-2] for T in block.features.values()]
    return torch.cat([torch.full((*w.shape[:-1], size), float(i == j), dtype=w.dtype, device=w.device) for i, size in enumerate(sizes)], -1)


def _split(points: Sequence[PointRows], rows: Tensor) -> tuple[Tensor, ...]:
    """The rows of each block."""
    return rows.split([next(iter(block.features.values())).shape[-2] for block in points], -1)


def _assemble(points: Sequence[PointRows], linear: Sequence[LinearRows], w: Tensor, cotangent: Tensor) -> Tensor:
    """Σ T_kᵀ c_k of all blocks, and Lᵀ(Lw − g)."""
    total = torch.zeros_like(w)
    for block, pieces in zip(points, _pieces(points, cotangent), strict=True):
        for name, T in block.features.items():
            total = total + _back(T, pieces[name])
    for rows in linear:
        total = total + _back(rows.matrix, _spread(rows.at(w), w))
    return total


def _normal_equations(
    points: Sequence[PointRows], linear: Sequence[LinearRows], w: Tensor, rho: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """JᵀJ and Jᵀr, with J = Σ diag(ρ_k) T_k formed once."""
    gram, gradient = torch.zeros_like(w[..., None] * w[..., None, :]), torch.zeros_like(w)
    for block, pieces, r in zip(points, _pieces(points, slopes), _split(points, rho), strict=True):
        jacobian = _weighted(list(pieces.values()), list(block.features.values()), w.dtype)
        gram, gradient = gram + jacobian.mT @ jacobian, gradient + _back(jacobian, r)
    for rows in linear:
        matrix = rows.matrix.to(w.dtype)
        gram, gradient = gram + matrix.mT @ matrix, gradient + _back(matrix, _spread(rows.at(w), w))
    return gram, gradient


def _with_curvature(matrix: Tensor, j: int, features: list[Tensor], curvature: list[Tensor]) -> Tensor:
    """``matrix`` and the terms T_jᵀ C_jk T_k and T_kᵀ C_kj T_j, k ≥ j, of one block; a C that is zero costs nothing."""
    halved = [c / 2 if k == j else c for k, c in enumerate(curvature)]
    which = [k for k in range(j, len(features)) if _may_matter(curvature[k])]
    if not which:
        return matrix
    left = _weighted([halved[k] for k in which], [features[k] for k in which], matrix.dtype)
    product = left.mT @ features[j].to(matrix.dtype)
    return matrix + product + product.mT


def _weighted(factors: list[Tensor], features: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Σ diag(c_k) T_k."""
    total = factors[0].unsqueeze(-1) * features[0].to(dtype)
    for c, T in zip(factors[1:], features[1:], strict=True):
        total = torch.addcmul(total, c.unsqueeze(-1), T.to(dtype))
    return total


def _back(matrix: Tensor, rows: Tensor) -> Tensor:
    """Lᵀv."""
    return (rows.unsqueeze(-2) @ matrix.to(rows.dtype)).squeeze(-2)


def _may_matter(values: Tensor) -> bool:
    """Whether some entry is not zero; a batched tensor cannot be asked."""
    return _functorch.is_functorch_wrapped_tensor(values) or bool((values != 0).any())


def one_each(rho: Any, products: dict[str, Tensor]) -> Tensor:
    """Refuse rows that are not one number for each point.

    Args:
        rho: what a user's function returned.
        products: ``(*batch, P)`` each, what it was given.

    Raises:
        ShapeError: it is no tensor that broadcasts to ``(*batch, P)``, or has one number for all points.
    """
    points = next(iter(products.values())).shape
    if not isinstance(rho, Tensor) or rho.shape[-1:] != points[-1:] or rho.dim() > len(points):
        came = tuple(rho.shape) if isinstance(rho, Tensor) else type(rho).__name__
        raise ShapeError(f"with features= the residual must return one number for each point, {tuple(points)}, got {came}")
    return rho.expand(points)
