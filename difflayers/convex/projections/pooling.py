r"""Pooling adjacent violators: the blocks on which an isotonic regression is constant, for a whole batch of rows.

.. math:: \min_{p_1 \le p_2 \le \dots \le p_n} \sum_i w_i (p_i - y_i)^2.

p is the weighted mean of y in each block; blocks are all that is found here, without a derivative. SciPy pools one sequence a call, which
costs more than the pooling of a short row. So rows are laid one above the other, in values that leave the blocks of a row as they are, and
become one long sequence whose blocks cannot reach from one row to the next.

With y and w given by their logarithms, a row may span more than the exponents of floating-point numbers. It is then cut where all that is before
is smaller than all that follows. No block crosses a cut, so the distance between the parts does not matter.

Reference: Best and Chakravarti, Active set algorithms for isotonic regression, Mathematical Programming 47 (1990).
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["pool", "pool_exponentials"]

_TOGETHER = 128  # rows in one sequence: their places cost seven of 53 bits
_REACH = 300.0  # the exponents that one row may span; two of them are less than the 709 of a float64
_APART = 1e-6  # between the exponents of neighbouring rows, far above their rounding


def pool(y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """For each entry, the index of the first one of its block. Neighbours on the same level are one block.

    Args:
        y: ``(rows, n)``, finite.
        weights: ``(rows, n)``, positive; None for equal ones.
    """
    rows, n = y.shape
    first = np.empty((rows, n), dtype=np.int64)
    if not first.size:
        return first
    low = y.min(1, keepdims=True)
    # A power of two, so that levels that are equal stay equal.
    width = np.exp2(np.frexp(y.max(1, keepdims=True) - low)[1])
    place = 2 * (np.arange(rows)[:, None] % _TOGETHER)
    stacked = (y - low) / width + place
    for begin in range(0, rows, _TOGETHER):
        part = slice(begin, begin + _TOGETHER)
        found = _first(stacked[part].ravel(), None if weights is None else weights[part].ravel()).reshape(-1, n)
        first[part] = found - np.arange(0, found.size, n)[:, None]
    return first


def pool_exponentials(log_y: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """As :func:`pool` for y and weights given by their logarithms, of any range.

    Args:
        log_y: ``(rows, n)``, finite.
        log_weights: ``(rows, n)``, finite.
    """
    rows, n = log_y.shape
    if not log_y.size:
        return np.empty((rows, n), dtype=np.int64)
    begin = np.arange(0, rows * n, n)
    if max(np.ptp(log_y, 1).max(), np.ptp(log_weights, 1).max()) > _REACH:
        begin = np.flatnonzero(_after_cut(log_y))
    t, log_w = log_y.ravel(), log_weights.ravel()
    count = np.diff(begin, append=t.size)
    low, heaviest = np.minimum.reduceat(t, begin), np.maximum.reduceat(log_w, begin)
    reach = np.maximum.reduceat(t, begin) - low
    wide = (reach > _REACH) | (heaviest - np.minimum.reduceat(log_w, begin) > _REACH)
    step = np.where(wide, 0, reach) + _APART
    level = np.cumsum(step) - step
    # One sequence for each span of exponents, from the first part that begins in it.
    head = np.flatnonzero(np.diff(np.floor(level / _REACH), prepend=-1))
    level -= np.repeat(level[head], np.diff(head, append=len(level)))
    exponent, log_w = t - np.repeat(low - level, count), log_w - np.repeat(heaviest, count)
    alone = np.repeat(wide, count)
    exponent[alone] = log_w[alone] = 0
    y, w = np.exp(exponent), np.exp(log_w)
    first = np.empty(t.size, dtype=np.int64)
    ends = [*begin[head], t.size]
    for start, stop in zip(ends[:-1], ends[1:], strict=True):
        first[start:stop] = start + _first(y[start:stop], w[start:stop])
    for i in np.flatnonzero(wide):
        part = slice(begin[i], begin[i] + count[i])
        first[part] = begin[i] + _first_by_logarithms(log_y.ravel()[part], log_weights.ravel()[part])
    return first.reshape(rows, n) - np.arange(0, rows * n, n)[:, None]


def _first(y: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    from scipy.optimize import isotonic_regression

    ends = isotonic_regression(y, weights=weights).blocks
    return np.repeat(ends[:-1], np.diff(ends))


def _after_cut(t: np.ndarray) -> np.ndarray:
    """Where a row begins, or all that is before is smaller than all that follows."""
    cut = np.ones(t.shape, dtype=bool)
    cut[:, 1:] = np.maximum.accumulate(t, 1)[:, :-1] < np.minimum.accumulate(t[:, ::-1], 1)[:, -2::-1]
    return cut


def _first_by_logarithms(log_y: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """One row, with sums kept as logarithms."""
    begins: list[int] = []
    masses: list[float] = []  # log Σ w y, and log Σ w, of each block
    weights: list[float] = []
    for i, (mass, weight) in enumerate(zip((log_y + log_weights).tolist(), log_weights.tolist(), strict=True)):
        begin = i
        while begins and masses[-1] - weights[-1] >= mass - weight:
            begin, mass, weight = begins.pop(), _log_sum(masses.pop(), mass), _log_sum(weights.pop(), weight)
        begins.append(begin)
        masses.append(mass)
        weights.append(weight)
    return np.repeat(begins, np.diff(begins, append=len(log_y)))


def _log_sum(a: float, b: float) -> float:
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))
