r"""Soft sorting and ranking: projections on the permutahedron.

The permutahedron :math:`\mathcal P(w)` is the convex hull of the permutations of w. Sorting and ranking are linear programs on it,
and a strength ε of regularization makes their solutions differentiable: with ρ = (n, …, 1) and in descending order,

.. math:: s = P_{\mathcal P(x)}(ρ / ε), \qquad r = P_{\mathcal P(ρ)}(-x / ε), \qquad P_{\mathcal P(w)}(z) = \arg\min_{p \in \mathcal P(w)} \tfrac12 \|p - z\|^2,

or, for ``"kl"``, with the Kullback–Leibler divergence between exponentials in the place of the square. For sorted z and w the projection is
p = z − v, where v is the isotonic regression of z − w. It pools neighbours into blocks B, and on each of them v is

.. math:: v_B = \operatorname{mean}(z_B) - \operatorname{mean}(w_B) \quad\text{or, for kl,}\quad \operatorname{logsumexp}(z_B) - \operatorname{logsumexp}(w_B).

The blocks are found without a derivative, by one sort and by pooling adjacent violators, in :math:`O(n \log n)`. The projection is the solution
of a system that is linear within them, and autograd differentiates that solution: its Jacobian averages over each block, with
equal weights or with those of a softmax.

References: Blondel, Teboul, Berthet and Djolonga, Fast differentiable sorting and ranking, ICML 2020 (arXiv:2002.08871).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..convex.projections.pooling import pool, pool_exponentials
from ..implicit.broadcasting import BroadcastingProblem
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction
from ..implicit.methods import LinearMethod
from .arguments import Strength, check_choice, rows_and_strength

__all__ = ["soft_rank", "soft_sort"]

_LARGEST = 1e300  # what an infinite entry is counted as


@eager
def soft_sort(
    x: Tensor,
    *,
    regularization: Literal["l2", "kl"] = "l2",
    regularization_strength: Strength = 1.0,
    dim: int = -1,
    descending: bool = False,
) -> Tensor:
    """The values of x in order, relaxed. They are in order, and with ``"l2"`` their sum is that of x.

    The weaker the regularization, the closer to ``torch.sort``: below a positive strength, which depends on the gaps of x, they are equal.
    The values and the meaning of the arguments are torchsort's.

    Args:
        x: ``(*batch, n)``, or n in another place: see ``dim``.
        regularization: ``"l2"``, or ``"kl"``, whose values lie above those of x by a logarithm of the block's size.
        regularization_strength: ε > 0; a tensor is of shape ``(*batch,)``, and is differentiated, too.
        dim: what is sorted.
        descending: ``-soft_sort(-x)``.

    Returns:
        As x. A row that has a NaN or an infinite entry, or a strength in a tensor that is not positive, is NaN.

    Raises:
        ShapeError: x is not a floating tensor of at least one dimension, or the strength has not the shape of its batch.
        ValueError: the strength is a number that is not positive, or the regularization is not known.

    References:
        Blondel, Teboul, Berthet and Djolonga, ICML 2020.

    Example:
        >>> import torch
        >>> from difflayers.sorting import soft_sort
        >>> soft_sort(torch.tensor([3.0, 1.0, 2.5]), regularization_strength=0.5)
        tensor([1.0000, 2.5000, 3.0000])
        >>> soft_sort(torch.tensor([3.0, 1.0, 2.5]), regularization_strength=2.0)
        tensor([1.6667, 2.1667, 2.6667])
    """
    check_choice(regularization, "regularization", ("l2", "kl"))
    x, strength, wanted = rows_and_strength(x, regularization_strength, dim)
    group, base, block, level, size, below = _blocks(_Sorted(x.dim() - 1, strength, regularization == "kl", not descending), x, strength)
    sign = 1 if descending else -1
    if regularization == "l2":
        pooled = torch.zeros_like(x).scatter_add(-1, group, x - base).gather(-1, block) / size
        values = level + pooled + sign * ((size - 1) / 2 - below) / strength
    else:
        mass = torch.zeros_like(x).scatter_add(-1, group, torch.exp(sign * (x - base))).gather(-1, block)
        values = level + sign * (torch.log(mass) - below / strength - _log_geometric_sum(size, strength))
    return values.to(wanted).movedim(-1, dim)


@eager
def soft_rank(
    x: Tensor,
    *,
    regularization: Literal["l2", "kl"] = "l2",
    regularization_strength: Strength = 1.0,
    dim: int = -1,
    descending: bool = False,
) -> Tensor:
    """The ranks 1 to n of the entries of x, relaxed. They are in the order of x, between 1 and n, and sum to n (n + 1) / 2.

    The weaker the regularization, the closer to the ranks: below a positive strength, which depends on the gaps of x, they are equal, and
    equal entries share the mean of theirs. The values and the meaning of the arguments are torchsort's.

    Args:
        x: ``(*batch, n)``, or n in another place: see ``dim``. Infinite entries take the first or last ranks, and the others are
            as without them: a row can be padded.
        regularization: ``"l2"`` or ``"kl"``.
        regularization_strength: ε > 0; a tensor is of shape ``(*batch,)``, and is differentiated, too.
        dim: what is ranked.
        descending: the largest entry has rank 1, as ``soft_rank(-x)``.

    Returns:
        As x. A row that has a NaN, or a strength in a tensor that is not positive, is NaN.

    Raises:
        ShapeError: x is not a floating tensor of at least one dimension, or the strength has not the shape of its batch.
        ValueError: the strength is a number that is not positive, or the regularization is not known.

    References:
        Blondel, Teboul, Berthet and Djolonga, ICML 2020.

    Example:
        >>> import torch
        >>> from difflayers.sorting import soft_rank
        >>> soft_rank(torch.tensor([3.0, 1.0, 2.5]), regularization_strength=0.1)
        tensor([3., 1., 2.])
        >>> soft_rank(torch.tensor([3.0, 1.0, 2.5]))
        tensor([2.7500, 1.0000, 2.2500])
    """
    check_choice(regularization, "regularization", ("l2", "kl"))
    x, strength, wanted = rows_and_strength(x, regularization_strength, dim)
    # Infinite entries are in blocks of their own, where they must not meet as inf − inf.
    x = (-x if descending else x).clamp(-_LARGEST, _LARGEST)
    group, base, size, total = _blocks(_Ranked(x.dim() - 1, strength, regularization == "kl"), x, strength)
    deviation = (x - base) / strength
    if regularization == "l2":
        mean = torch.zeros_like(x).scatter_add(-1, group, deviation).gather(-1, group) / size
        ranks = deviation - mean + total / size
    else:
        weight = torch.exp(deviation)
        ranks = total * weight / torch.zeros_like(x).scatter_add(-1, group, weight).gather(-1, group)
    return ranks.to(wanted).movedim(-1, dim)


def _log_geometric_sum(count: Tensor, strength: float | Tensor) -> float | Tensor:
    """log Σ exp(−i / ε) over i < count."""
    if isinstance(strength, Tensor):
        return torch.log(-torch.expm1(-count / strength)) - torch.log(-torch.expm1(-1 / strength))
    return torch.log(-torch.expm1(-count / strength)) - math.log(-math.expm1(-1 / strength))


def _blocks(problem: _Pooled, x: Tensor, strength: float | Tensor) -> tuple[Tensor, ...]:
    operands = [x.detach()] if isinstance(strength, float) else [x.detach(), strength.detach()]
    return ImplicitFunction.apply(problem, x.new_zeros(0), *visible_to_modes(operands))[1:]


class _Pooled(BroadcastingProblem):
    """The blocks of each row, found on plain tensors for all elements of all vmaps at once.

    What it returns carries no derivative; entries of x and places in the sorted order point to their block by the index of its first place.
    """

    def __init__(self, batch_ndim: int, strength: float | Tensor, kl: bool, mirrored: bool = False) -> None:
        super().__init__(_nothing, _nothing, LinearMethod(), batch_ndim=batch_ndim)
        self.core_ndims = (1,) if isinstance(strength, float) else (1, 1)
        self.strength, self.kl, self.mirrored = strength, kl, mirrored

    def deeper(self, size: int) -> _Pooled:
        return type(self)(self.batch_ndim + 1, self.strength, self.kl, self.mirrored)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        x, strength = theta if len(theta) == 2 else (theta[0], self.strength)
        device, shape = x.device, x.shape
        if isinstance(strength, Tensor):
            shape = torch.broadcast_shapes(x.shape, strength.shape)
            strength = strength.expand(*shape[:-1], 1).reshape(-1, 1).cpu().numpy()
        rows = x.expand(shape).reshape(math.prod(shape[:-1]), shape[-1]).cpu().numpy()
        rows = -rows if self.mirrored else rows
        order = rows.argsort(1)
        z = np.take_along_axis(rows, order, 1)
        with np.errstate(all="ignore"):  # what is not finite is seen at the end
            y, log_weights = self.regression(z, strength)
        broken = ~(np.isfinite(y[:, :1]) & np.isfinite(y[:, -1:]) & (strength > 0))
        if broken.any():
            y, log_weights = np.where(broken, 0, y), np.where(broken, 0, log_weights)
            z = np.where(broken, np.nan, z)
        first = pool_exponentials(y, log_weights) if self.kl else pool(y)
        parts = self.described(order, -z if self.mirrored else z, first)
        return (x0.clone(), *(torch.from_numpy(part).reshape(shape).to(device) for part in parts))

    def regression(self, z: np.ndarray, strength: Any) -> tuple[np.ndarray, np.ndarray]:
        """What is regressed on increasing sequences, up to a factor, for ascending rows; for kl its logarithm, and those of the weights."""
        raise NotImplementedError

    def described(self, order: np.ndarray, z: np.ndarray, first: np.ndarray) -> Sequence[np.ndarray]:
        """What the formulas need to know of the blocks."""
        raise NotImplementedError


class _Sorted(_Pooled):
    def regression(self, z: np.ndarray, strength: Any) -> tuple[np.ndarray, np.ndarray]:
        place, z = np.arange(z.shape[1]), z - z[:, :1]
        return (place / strength - z, z) if self.kl else (place - strength * z, z)

    def described(self, order: np.ndarray, z: np.ndarray, first: np.ndarray) -> Sequence[np.ndarray]:
        size = _sizes(first)
        last = first + size - 1
        level = np.take_along_axis(z, last, 1)
        group, base = np.empty_like(first), np.empty_like(z)
        np.put_along_axis(group, order, first, 1)
        np.put_along_axis(base, order, level, 1)
        below = (last - np.arange(first.shape[1])).astype(z.dtype)
        # Rows were sorted the other way round.
        return group, base, *(part[:, ::-1].copy() for part in (first, level, size.astype(z.dtype), below))


class _Ranked(_Pooled):
    def regression(self, z: np.ndarray, strength: Any) -> tuple[np.ndarray, np.ndarray]:
        rank = np.arange(1.0, z.shape[1] + 1)
        log_rank = np.broadcast_to(np.log(rank), z.shape)
        z = _without_infinities(z, strength * len(rank)) if (np.abs(z[:, [0, -1]]) >= _LARGEST).any() else z - z[:, :1]
        return (z / strength - log_rank, log_rank) if self.kl else (z - strength * rank, log_rank)

    def described(self, order: np.ndarray, z: np.ndarray, first: np.ndarray) -> Sequence[np.ndarray]:
        size = _sizes(first)
        total = size * (first + (size + 1) / 2)
        parts = [np.empty_like(part) for part in (first, z, size, total)]
        for part, source in zip(parts, (first, np.take_along_axis(z, first + size - 1, 1), size, total), strict=True):
            np.put_along_axis(part, order, source, 1)
        return parts


def _without_infinities(z: np.ndarray, apart: Any) -> np.ndarray:
    """Ascending rows, with infinite entries moved near the others, but by more than ``apart``: no block has both."""
    finite = np.abs(z) < _LARGEST
    lowest = np.where(finite, z, np.inf).min(1, keepdims=True)
    z = z - np.where(finite.any(1, keepdims=True), lowest, 0)
    highest = np.where(finite, z, 0).max(1, keepdims=True)
    margin = 2 * (highest + apart)
    return np.clip(z, -margin, highest + margin)


def _sizes(first: np.ndarray) -> np.ndarray:
    """How many entries the block of each one has."""
    rows, n = first.shape
    begins = np.flatnonzero(first == np.arange(n))
    count = np.diff(begins, append=rows * n)
    return np.repeat(count, count).reshape(rows, n)


def _nothing(*_: Any) -> Any:
    raise RuntimeError("blocks are pooled, not solved for")
