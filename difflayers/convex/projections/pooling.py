r"""Pooling adjacent violators: the blocks on which an isotonic regression is constant, for a whole batch of rows.

.. math:: \min_{p_1 \le p_2 \le \dots \le p_n} \sum_i w_i (p_i - y_i)^2.

p is the weighted mean of y in each block; blocks are all that is found here, without a derivative. SciPy pools one sequence a call, which
costs more than the pooling of a short row. So rows are laid one above the other, in values that leave the blocks of a row as they are, and
become one long sequence whose blocks cannot reach from one row to the next.

With y and w given by their logarithms, a row may span more than the exponents of floating-point numbers. It is then cut where all that is
before is smaller than all that follows. No block crosses a cut, so the distance between the parts does not matter. Rows that mostly rise
are cut, too: little is left to pool.

Reference: Best and Chakravarti, Active set algorithms for isotonic regression, Mathematical Programming 47 (1990).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["pool", "pool_exponentials"]

_TOGETHER = 256  # rows in one sequence: their places cost eight of 53 bits
_REACH = 300.0  # the exponents that one row may span; two of them are less than the 709 of a float64
_MOSTLY = 0.9  # the share of rises above which a search for cuts takes less time than it saves
_APART = 1e-6  # between the exponents of neighbouring rows, far above their rounding


def pool(y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Where blocks begin and end: block k has the entries ``ends[k] ... ends[k + 1] - 1`` of all rows, one after the other.

    Neighbours on the same level are one block.

    Args:
        y: ``(rows, n)``, finite.
        weights: ``(rows, n)``, positive; None for equal ones.
    """
    rows, n = y.shape
    if _rising(y) == 1:
        return np.arange(y.size + 1)
    low = y.min(1, keepdims=True)
    # A power of two, so that levels that are equal stay equal.
    width = np.ldexp(1.0, np.frexp(y.max(1, keepdims=True) - low)[1])
    stacked = (y - low) / width
    stacked += np.arange(0, 2 * rows, 2)[:, None] % (2 * _TOGETHER)
    stacked, weights = stacked.ravel(), None if weights is None else weights.ravel()
    return _ends(stacked, weights, range(0, rows * n, _TOGETHER * n))


def pool_exponentials(log_y: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """As :func:`pool` for y and weights given by their logarithms, of any range.

    Args:
        log_y: ``(rows, n)``, finite.
        log_weights: ``(rows, n)``, finite.
    """
    rows, n = log_y.shape
    rising = _rising(log_y)
    if rising == 1:
        return np.arange(log_y.size + 1)
    t, log_w = log_y.ravel(), log_weights.ravel()
    if rising < _MOSTLY and max(np.ptp(log_y, 1).max(), np.ptp(log_weights, 1).max()) <= _REACH:
        return _stacked(t, log_w, np.arange(0, rows * n, n))
    starts = _after_cut(log_y).ravel()
    rest = np.flatnonzero(~(starts & np.append(starts[1:], True)))
    if rest.size:
        t, log_w, begin = t[rest], log_w[rest], np.flatnonzero(starts[rest])
        wide = np.maximum(_spans(t, begin), _spans(log_w, begin)) > _REACH
        for i in np.flatnonzero(wide):
            part = slice(begin[i], begin[i + 1] if i + 1 < len(begin) else len(t))
            starts[rest[part][_starts_by_logarithms(t[part], log_w[part])]] = True
        if not wide.all():
            narrow = np.repeat(~wide, np.diff(begin, append=len(t)))
            rest = rest[narrow]
            ends = _stacked(t[narrow], log_w[narrow], _begins(begin, wide, len(t)))
            starts[rest[ends[:-1]]] = True
    return np.append(np.flatnonzero(starts), rows * n)


def _rising(y: np.ndarray) -> float:
    """The share of entries that are larger than the one before, in the rows after their first ones; at 1 there is nothing to pool."""
    pairs = y[:, 1:] > y[:, :-1]
    return np.count_nonzero(pairs) / pairs.size if pairs.size else 1.0


def _begins(begin: np.ndarray, dropped: np.ndarray, size: int) -> np.ndarray:
    """Where the parts that are kept begin once the others are taken out."""
    count = np.diff(begin, append=size)[~dropped]
    return np.cumsum(count) - count


def _spans(values: np.ndarray, begin: np.ndarray) -> np.ndarray:
    return np.maximum.reduceat(values, begin) - np.minimum.reduceat(values, begin)


def _stacked(t: np.ndarray, log_w: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """The blocks of parts whose exponents have room in a float64; each part is moved above the one before."""
    count = np.diff(begin, append=t.size)
    low = np.minimum.reduceat(t, begin)
    step = np.maximum.reduceat(t, begin) - low + _APART
    level = np.cumsum(step) - step
    # One sequence for each span of exponents, from the first part that begins in it.
    head = np.flatnonzero(np.diff(np.floor(level / _REACH), prepend=-1))
    level -= np.repeat(level[head], np.diff(head, append=len(level)))
    y, w = t - np.repeat(low - level, count), log_w - np.repeat(np.maximum.reduceat(log_w, begin), count)
    return _ends(np.exp(y, out=y), np.exp(w, out=w), begin[head])


def _ends(y: np.ndarray, weights: np.ndarray | None, begins: Sequence[int] | np.ndarray) -> np.ndarray:
    """The blocks of the sequences that begin at ``begins``, pooled one by one."""
    from scipy.optimize import isotonic_regression

    ends = [np.zeros(1, dtype=np.intp)]
    for begin, end in itertools.pairwise([*begins, len(y)]):
        part = slice(begin, end)
        ends.append(begin + isotonic_regression(y[part], weights=None if weights is None else weights[part]).blocks[1:])
    return np.concatenate(ends)


def _after_cut(t: np.ndarray) -> np.ndarray:
    """Where a row begins, or all that is before is smaller than all that follows."""
    cut = np.ones(t.shape, dtype=bool)
    cut[:, 1:] = np.maximum.accumulate(t, 1)[:, :-1] < np.minimum.accumulate(t[:, ::-1], 1)[:, -2::-1]
    return cut


def _starts_by_logarithms(log_y: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
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
    return np.array(begins)


def _log_sum(a: float, b: float) -> float:
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))
