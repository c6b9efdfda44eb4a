r"""Soft sorting and ranking: projections on the permutahedron.

The permutahedron :math:`\mathcal P(w)` is the convex hull of the permutations of w. Sorting and ranking are linear programs on it,
and a strength ε of regularization makes their solutions differentiable: with ρ = (n, …, 1) and in descending order,

.. math::
   s = P_{\mathcal P(x)}(ρ / ε), \qquad r = P_{\mathcal P(ρ)}(-x / ε), \qquad
   P_{\mathcal P(w)}(z) = \arg\min_{p \in \mathcal P(w)} \tfrac12 \|p - z\|^2,

or, for ``"kl"``, with the Kullback–Leibler divergence between exponentials in the place of the square. For sorted z and w the projection is
p = z − v, where v is the isotonic regression of z − w. It pools neighbours into blocks B, and on each of them v is

.. math::
   v_B = \operatorname{mean}(z_B) - \operatorname{mean}(w_B) \quad\text{or, for kl,}\quad
   \operatorname{logsumexp}(z_B) - \operatorname{logsumexp}(w_B).

The blocks are found without a derivative, by one sort and by pooling adjacent violators, in :math:`O(n \log n)`. This happens on the CPU,
wherever x is. Given the blocks, the formulas above solve the optimality conditions, and autograd differentiates them: the Jacobian
averages over each block, with equal weights or with those of a softmax.

References: Blondel, Teboul, Berthet and Djolonga, Fast differentiable sorting and ranking, ICML 2020 (arXiv:2002.08871).
"""

from __future__ import annotations

import abc
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
from ..implicit.function import ImplicitFunction, in_a_transform
from .arguments import Strength, check_choice, rows_and_strength

__all__ = ["soft_rank", "soft_sort"]

_LARGEST = 1e300  # what an infinite entry is counted as
_AT_ONCE = 32768  # entries that are pooled together, so that what is made on the way stays in the cache


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
    kl = regularization == "kl"
    mirrored = kl and not descending
    x = -x if mirrored else x
    order, last, base, middle, size = _blocks(_Sorted(x.dim() - 1, strength, kl), x, strength)
    z = x.expand(order.shape).gather(-1, order)
    rank = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    if kl:
        steps = (rank - 1 - last) / strength - _log_geometric_sum(rank, strength).expand(z.shape).gather(-1, (size - 1).long())
        values = base + (_sums(torch.exp(z - base), last).log() + steps)
    else:
        values = torch.addcdiv(base + (rank - middle) / strength, _sums(z - base, last), size)
    values = -values if mirrored else values
    return (values.flip(-1) if kl or descending else values).to(wanted).movedim(-1, dim)


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
        x: ``(*batch, n)``, or n in another place: see ``dim``. Infinite entries take the first and the last ranks. Those of +∞ (−∞ if
            descending) leave the other ranks as they are without them, so rows of different lengths are padded with them.
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
    _, last, base, middle, size = _blocks(_Ranked(x.dim() - 1, strength, regularization == "kl"), x, strength)
    deviation = (x - base) / strength
    if regularization == "l2":
        ranks = torch.addcdiv(deviation, _sums(deviation, last), size, value=-1) + middle
    else:
        weight = torch.exp(deviation)
        ranks = size * middle * weight / _sums(weight, last)
    return ranks.to(wanted).movedim(-1, dim)


def _sums(values: Tensor, last: Tensor) -> Tensor:
    """The sum over its block at each place, where ``last`` tells the blocks of a row apart."""
    return torch.zeros_like(values).scatter_add_(-1, last, values).gather(-1, last)


def _log_geometric_sum(count: Tensor, strength: float | Tensor) -> Tensor:
    """log Σ exp(−i / ε) over i < count, for the counts 1, 2, ..."""
    logs = torch.log(-torch.expm1(-count / strength))
    return logs - logs[..., :1]


def _blocks(problem: _Pooled, x: Tensor, strength: float | Tensor) -> tuple[Tensor, ...]:
    """What the problem finds."""
    operands = [x.detach(), strength.detach()] if isinstance(strength, Tensor) else [x.detach()]
    if not torch._C._len_torch_function_stack() and not in_a_transform(*operands):
        return problem.find(x.new_zeros(0), operands)[1:]  # nothing to see through: a Function costs as much as a row
    return ImplicitFunction.apply(problem, x.new_zeros(0), *visible_to_modes(operands))[1:]


class _Pooled(BroadcastingProblem):
    """The order of each row and its blocks, found on plain tensors for all elements of all vmaps at once.

    Nothing that it returns carries a derivative. It is the entry at each place in ascending order, counted from zero, and then for each
    place (or, ``by_entry``, for each entry) of its block the last place, the value there, the mean rank and the size. The value is NaN
    where something in the row is not finite, or the strength is not positive. Equal entries are in any order.
    """

    by_entry = False

    def __init__(self, batch_ndim: int, strength: float | Tensor, kl: bool) -> None:
        super().__init__(batch_ndim)
        self.core_ndims = (1, 1) if isinstance(strength, Tensor) else (1,)
        self.strength, self.kl = strength, kl

    def deeper(self, size: int) -> _Pooled:
        return type(self)(self.batch_ndim + 1, self.strength, self.kl)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        x, strength = theta if len(theta) == 2 else (theta[0], self.strength)
        shape = x.shape
        if isinstance(strength, Tensor):
            shape = torch.broadcast_shapes(x.shape, strength.shape)
            strength = strength.expand(*shape[:-1], 1).reshape(-1, 1).cpu().numpy()
        n = shape[-1]
        rows = x.expand(shape).reshape(math.prod(shape[:-1]), n).cpu().numpy()
        places = torch.empty(2, *rows.shape, dtype=torch.int64)
        numbers = torch.empty(3, *rows.shape, dtype=torch.float64)
        arrays = [*places.numpy(), *numbers.numpy()]
        count = max(_AT_ONCE // max(n, 1), 1)
        for begin in range(0, len(rows), count) if n else ():
            part = slice(begin, begin + count)
            self.describe(rows[part], strength[part] if isinstance(strength, np.ndarray) else strength, [array[part] for array in arrays])
        return (x0.clone(), *places.view(2, *shape).to(x.device), *numbers.view(3, *shape).to(x.device))

    def describe(self, rows: np.ndarray, strength: Any, found: Sequence[np.ndarray]) -> None:
        """Sort and pool some rows ``(count, n)``, and write down what is found."""
        count, n = rows.shape
        order, *known = found
        above = np.arange(0, rows.size, n)[:, None]
        order[:] = rows.argsort(1)
        entries = order + above
        z = rows.take(entries)
        with np.errstate(all="ignore"):  # what is not finite is seen at the end
            y, log_weights = self.regression(z, strength)
        broken = ~(np.isfinite(y[:, :1]) & np.isfinite(y[:, -1:]) & (strength > 0))
        if broken.any():
            y, log_weights = np.where(broken, 0, y), np.where(broken, 0, log_weights)
            z = np.where(broken, np.nan, z)
        ends = pool_exponentials(y, log_weights) if self.kl else pool(y)
        sizes = np.diff(ends)
        size, end = (np.repeat(part, sizes).reshape(count, n) for part in (sizes, ends[1:] - 1))
        last = end - above
        for part, values in zip(known, (last, z.take(end), last + (3 - size) / 2, size), strict=True):
            if self.by_entry:
                part.reshape(-1)[entries] = values
            else:
                part[:] = values

    @abc.abstractmethod
    def regression(self, z: np.ndarray, strength: Any) -> tuple[np.ndarray, np.ndarray]:
        """What is regressed on increasing sequences, up to a factor, for ascending rows; for kl its logarithm, and those of the weights."""


class _Sorted(_Pooled):
    def regression(self, z: np.ndarray, strength: Any) -> tuple[np.ndarray, np.ndarray]:
        place, z = np.arange(z.shape[1]), z - z[:, :1]
        return (place / strength - z, z) if self.kl else (place - strength * z, z)


class _Ranked(_Pooled):
    by_entry = True

    def regression(self, z: np.ndarray, strength: Any) -> tuple[np.ndarray, np.ndarray]:
        rank = np.arange(1.0, z.shape[1] + 1)
        z = _without_infinities(z, strength * len(rank)) if (np.abs(z[:, [0, -1]]) >= _LARGEST).any() else z - z[:, :1]
        if not self.kl:
            return z - strength * rank, z
        log_rank = np.log(rank)
        return z / strength - log_rank, np.broadcast_to(log_rank, z.shape)


def _without_infinities(z: np.ndarray, apart: Any) -> np.ndarray:
    """Ascending rows, with infinite entries moved near the others, but by more than ``apart``: no block has both."""
    finite = np.abs(z) < _LARGEST
    lowest = np.where(finite, z, np.inf).min(1, keepdims=True)
    z = z - np.where(finite.any(1, keepdims=True), lowest, 0)
    highest = np.where(finite, z, 0).max(1, keepdims=True)
    margin = 2 * (highest + apart)
    return np.clip(z, -margin, highest + margin)
