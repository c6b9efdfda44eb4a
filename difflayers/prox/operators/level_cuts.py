r"""The constant pieces of total variation on chains, by cuts at levels, for many rows at once.

.. math:: \min_u \; \tfrac12 \sum_i (u_i - y_i)^2 + \sum_i w_i |u_{i+1} - u_i|.

For any level μ the entries with :math:`u_i > μ` are the set S that maximizes :math:`\sum_{i ∈ S} (y_i - μ) - \sum_{i ∈ ∂S} w_i`, a cut of
the chain. Where a piece is cut, the multiplier of the gap is ±w, its two sides are problems of their own, and no entry moves to the
other side of μ. So with the mean of a piece as its level, either nothing is cut, and the piece is constant at that mean, or there are two
or more smaller pieces to go on with. All pieces of all rows are cut in the same round; rows of noise take 5 to 15 rounds.

The best cut of a chain is a recursion :math:`c_i = \operatorname{clamp}(c_{i-1} + y_i - μ, -w_i, w_i)`. Such functions are closed under
composition, so that the recursion is a scan: blocks are composed side by side, and what they are composed to is scanned the same way.

References: Chambolle and Darbon, On total variation minimization and surface evolution using parametric maximum flows, IJCV 84 (2009);
Johnson, A dynamic programming algorithm for the fused lasso and L0-segmentation, JCGS 22 (2013); Kumar and Bach, Active-set methods
for submodular minimization problems, JMLR 18 (2017), arXiv:1506.02852.
"""

from __future__ import annotations

import numpy as np

__all__ = ["level_cuts"]

_BLOCK = 8  # entries composed one after the other
_SHORT = 32  # entries that a loop over numbers scans faster than arrays


def level_cuts(y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Where u rises (1), falls (−1) or stays (0) from each entry to the next.

    Args:
        y: ``(rows, n)``, finite, n ≥ 1.
        weights: ``(rows, n − 1)``, nonnegative; may be infinite.

    Returns:
        ``(rows, n − 1)`` int8.
    """
    rows, n = y.shape
    signs = np.zeros(rows * n, dtype=np.int8)
    entry = np.arange(rows * n)
    starts = np.arange(0, rows * n, n)
    # Rows lie one after the other; a weight of zero ends each of them, and each piece that is cut.
    w = np.concatenate([weights, np.zeros((rows, 1))], axis=1).ravel()
    y = y.ravel().copy()
    while len(y):
        count = np.diff(starts, append=len(y))
        last = starts + count - 1
        excess = y - np.repeat(np.add.reduceat(y, starts) / count, count)
        gain = _scan(excess, -w, w) + excess
        # An entry whose gain exceeds the weight has its side whatever follows; the others share the next one's.
        decided = np.abs(gain) > w
        decided[last] = True
        decider = np.where(decided, np.arange(len(y)), len(y) - 1)
        above = (gain > 0)[np.minimum.accumulate(decider[::-1])[::-1]]
        cut = np.zeros(len(y), dtype=bool)
        cut[:-1] = above[1:] != above[:-1]
        cut[last] = False
        gaps = np.flatnonzero(cut)
        rises = np.where(above[gaps], -1, 1)
        signs[entry[gaps]] = rises
        y[gaps] += rises * w[gaps]
        y[gaps + 1] -= rises * w[gaps]
        w[gaps] = 0
        begins = np.zeros(len(y), dtype=bool)
        begins[starts] = True
        begins[gaps + 1] = True
        left = np.repeat(np.logical_or.reduceat(cut, starts), count)
        y, w, entry = y[left], w[left], entry[left]
        starts = np.flatnonzero(begins[left])
    return signs.reshape(rows, n)[:, :-1]


def _scan(step: np.ndarray, low: np.ndarray, high: np.ndarray, start: float = 0.0) -> np.ndarray:
    """c before each entry, where ``c = clamp(c + step, low, high)`` at each of them, from ``start`` on."""
    size = len(step)
    if size <= _SHORT:
        before, value = [], start
        for s, l, h in zip(step.tolist(), low.tolist(), high.tolist(), strict=True):
            before.append(value)
            value = min(max(value + s, l), h)
        return np.array(before)
    step, low, high = _columns(step, 0.0), _columns(low, -np.inf), _columns(high, np.inf)
    shift, floor, ceiling = step[0].copy(), low[0].copy(), high[0].copy()
    for s, l, h in zip(step[1:], low[1:], high[1:], strict=True):
        shift += s
        for bound in (floor, ceiling):
            _clamped_sum(bound, s, l, h, bound)
    before = np.empty_like(step)
    before[0] = _scan(shift, floor, ceiling, start)
    for k in range(_BLOCK - 1):
        _clamped_sum(before[k], step[k], low[k], high[k], before[k + 1])
    return before.T.ravel()[:size]


def _columns(values: np.ndarray, fill: float) -> np.ndarray:
    """Blocks of neighbours as columns."""
    padded = np.full(-(-len(values) // _BLOCK) * _BLOCK, fill)
    padded[: len(values)] = values
    return np.ascontiguousarray(padded.reshape(-1, _BLOCK).T)


def _clamped_sum(value: np.ndarray, step: np.ndarray, low: np.ndarray, high: np.ndarray, out: np.ndarray) -> None:
    np.add(value, step, out=out)
    np.maximum(out, low, out=out)
    np.minimum(out, high, out=out)
