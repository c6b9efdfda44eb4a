r"""A compiled forward for dense QPs: DAQP's dual active-set method, under a certificate of our own.

DAQP (MIT licence) changes one constraint of its active set at a time, in the space of the multipliers, where

.. math:: \min_{\lambda} \tfrac12 \lambda^\top M M^\top \lambda + d^\top \lambda, \qquad M = C L^{-\top}, \quad P = L L^\top,

is what the problem becomes once x is eliminated; C stacks the rows of G and A. It needs P to be positive definite, and is the fastest
way to a solution while the number of changes, about the number of active constraints, is not large.

An element of the batch is taken as solved if its point satisfies the optimality conditions to rounding, measured in the data as given and
relative to the terms that they add up, with a margin: each inequality has either a multiplier or a slack that is clearly positive. What
is not (no solution, singular P, a degenerate active set, whose multipliers are a matter of choice) is left to the interior point engine,
so that the choice of a solver changes no answer.

Reference: D. Arnström, A. Bemporad, D. Axehill, A dual active-set solver for embedded quadratic programming using recursive LDLᵀ
updates, IEEE Trans. Automat. Contr. 67 (2022), arXiv:2103.16236.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .normal_equations import DenseQP, KKTPoint, MaybeTensor

__all__ = ["NativeResult", "certify", "is_available", "solve_native"]

_NONE = 1e30  # DAQP's infinity
_EQUATION = 5  # DAQP's mark of a row that is an equation
_SETTINGS = {"primal_tol": 1e-10, "eps_prox": 0.0}  # no proximal term: P that is not positive definite is refused
_EXACT = 1e-12  # relative error of the optimality conditions that is rounding
_MARGIN = 1e-9  # relative size of a slack or a multiplier that is clearly not zero
_LONG = 1e7  # multiplications that are worth a thread


class NativeResult(NamedTuple):
    """What the compiled solver found.

    Attributes:
        point: x ``(B, n)`` and the multipliers, one of each pair of bounds being zero.
        solved: ``(B,)`` bool, the elements whose point was certified.
        near: ``(B,)`` bool, elements that were not, and whose point is worth starting from.
        primal_residual: ``(B,)``.
        dual_residual: ``(B,)``.
        duality_gap: ``(B,)``.
        iterations: ``(B,)`` int64, the changes of the active set.
    """

    point: KKTPoint
    solved: Tensor
    near: Tensor
    primal_residual: Tensor
    dual_residual: Tensor
    duality_gap: Tensor
    iterations: Tensor


@functools.cache
def is_available() -> bool:
    """Whether DAQP is installed."""
    return importlib.util.find_spec("daqp") is not None


def solve_native(problem: DenseQP) -> NativeResult:
    """Solve a batch of dense QPs with DAQP, in as many threads as torch uses.

    Args:
        problem: the batch, in float64 on the CPU.

    Example:
        >>> import torch
        >>> eye, one = torch.eye(2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        >>> found = solve_native(DenseQP(eye[None], -2 * eye[:1], eye.sum(0).view(1, 1, 2), one, eye[None, :0], one[:, :0]))
        >>> found.point.x.tolist(), found.solved.tolist()
        ([[1.5, -0.5]], [True])
    """
    data = _Data(problem)
    batch, n = data.q.shape
    x, multipliers = np.zeros((batch, n)), np.zeros((batch, data.upper.shape[1]))
    flags, iterations = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64)

    def work(first: int, last: int) -> None:
        model: Any = None
        for i in range(first, last):
            if data.sound[i]:
                found, flags[i], told, model = data.solve(i, model)
                x[i], multipliers[i], iterations[i] = found, told["lam"], told["iterations"]

    threads = int(min(torch.get_num_threads(), batch, 1 + batch * n * n * (n + data.upper.shape[1]) // _LONG))
    if threads == 1:
        work(0, batch)
    else:
        cuts = np.linspace(0, batch, threads + 1).astype(int).tolist()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, cuts[:-1], cuts[1:]))
    return _certified(data, x, multipliers, flags == 1, iterations)


def certify(problem: DenseQP, x: Tensor, y: Tensor, z: Tensor, z_box: MaybeTensor) -> NativeResult:
    """Measure a point that comes from elsewhere, such as the exact solution of an active set.

    Args:
        problem: the batch, in float64 on the CPU.
        x: ``(B, n)``.
        y: ``(B, p)``.
        z: ``(B, m)``, of any sign.
        z_box: ``(B, n)``, negative at lower bounds, or None without bounds.
    """
    data = _Data(problem)
    right_sign = (z >= 0).all(-1)
    if z_box is not None:  # a bound that is not there cannot hold a multiplier; which of the two is active is told by its sign
        right_sign &= ~((z_box < 0) & problem.lb.isneginf() | (z_box > 0) & problem.ub.isposinf()).any(-1)
    multipliers = torch.cat([z, y] if z_box is None else [z_box, z, y], -1)
    finite = torch.isfinite(x).all(-1) & torch.isfinite(multipliers).all(-1)
    ended = (right_sign & finite).numpy() & data.sound
    x, multipliers = (torch.where(torch.from_numpy(ended).unsqueeze(-1), part, 0.0).numpy() for part in (x, multipliers))
    return _certified(data, x, multipliers, ended, np.zeros(len(ended), dtype=np.int64))


class _Data:
    """The batch as DAQP wants it: limits of the bounds first, then of the rows G and A, which are stacked."""

    def __init__(self, problem: DenseQP) -> None:
        arrays: list[Any] = [None if part is None else np.ascontiguousarray(part.detach().numpy()) for part in problem]
        P, q, G, h, A, b, lb, ub = arrays
        self.n, self.m, self.p, self.boxed = q.shape[1], h.shape[1], b.shape[1], lb is not None
        if self.m and self.p:
            batch = max(len(G), len(A))
            rows = np.concatenate([np.broadcast_to(part, (batch, *part.shape[1:])) if len(part) < batch else part for part in (G, A)], 1)
        else:
            rows = G if self.m else A
        self.P, self.q, self.rows = P, q, rows
        self.shared = len(P) == 1 and len(rows) == 1
        self.upper = np.concatenate([ub, h, b] if self.boxed else [h, b], 1)
        self.lower = np.concatenate([lb, np.full(h.shape, -_NONE), b] if self.boxed else [np.full(h.shape, -_NONE), b], 1)
        # A sum is finite only if its terms are. Limits may be infinite, but not be no numbers, and those compare to nothing.
        self.equal = self.upper == self.lower
        self.sound = np.isfinite(P.sum((1, 2)) + q.sum(1) + rows.sum((1, 2)) + b.sum(1)) & (self.lower <= self.upper).all(1)
        np.minimum(self.upper, _NONE, out=self.upper)
        np.maximum(self.lower, -_NONE, out=self.lower)
        self.sense = np.where(self.equal, np.int32(_EQUATION), np.int32(0))

    def solve(self, i: int, model: Any) -> tuple[Any, int, Any, Any]:
        """x, the exit flag, what else is known, and the model to use for the next element if they share their matrices."""
        daqp: Any = importlib.import_module("daqp")
        P, rows = self.P[i if len(self.P) > 1 else 0], self.rows[i if len(self.rows) > 1 else 0]
        if not self.shared:
            x, _, flag, told = daqp.solve(P, self.q[i], rows, self.upper[i], self.lower[i], self.sense[i], **_SETTINGS)
            return x, flag, told, None
        if model is None:
            model = daqp.Model()
            model.settings = _SETTINGS
            flag, _ = model.setup(P, self.q[i], rows, self.upper[i], self.lower[i], self.sense[i])
        else:
            flag = model.update(f=self.q[i], bupper=self.upper[i], blower=self.lower[i], sense=self.sense[i])
        if flag < 0:
            return 0.0, flag, {"lam": 0.0, "iterations": 0}, None
        x, _, flag, told = model.solve()
        return x, flag, told, model if flag == 1 else None


def _certified(data: _Data, x: Any, multipliers: Any, ended: Any, iterations: Any) -> NativeResult:
    """Measure the optimality conditions, and make the point of the multipliers (positive at an upper limit, negative at a lower one)."""
    first = data.n if data.boxed else 0
    np.maximum(multipliers[:, first : first + data.m], 0.0, out=multipliers[:, first : first + data.m])
    box, rows = multipliers[:, :first], multipliers[:, first:]
    bounds: tuple[Any, Any] = (None, None)
    if data.boxed:  # a variable at its bound is at its bound, and not a rounding error beside it
        lowest, highest, pinned = data.lower[:, :first], data.upper[:, :first], data.equal[:, :first]
        x = np.where(box > 0, highest, np.where((box < 0) | pinned, lowest, x))
        bounds = torch.from_numpy(np.maximum(-box, 0.0)), torch.from_numpy(np.maximum(box, 0.0))
    curve = np.matmul(data.P, x[:, :, None])[:, :, 0]
    pull = np.matmul(rows[:, None, :], data.rows)[:, 0]
    value = np.matmul(data.rows, x[:, :, None])[:, :, 0]
    slope = curve + data.q
    forces = np.abs(np.concatenate([curve, data.q, pull, box], 1)).max(1, keepdims=True)
    lengths = np.sqrt(np.einsum("bij,bij->bi", data.rows, data.rows))
    gradient = slope + pull
    if data.boxed:
        gradient, value = gradient + box, np.concatenate([x, value], 1)
        lengths = np.concatenate([np.ones((len(lengths), first)), lengths], 1)
    # The distance to the nearer limit, negative outside, and the size of the terms that it is the difference of.
    above, below = data.upper - value, value - data.lower
    nearer = above < below
    slack, limit = np.where(nearer, above, below), np.where(nearer, data.upper, data.lower)
    scale = lengths * np.sqrt(np.einsum("bi,bi->b", x, x))[:, None] + np.abs(limit)
    active = multipliers != 0
    held = active | data.equal
    # An equation without a multiplier may be one too many.
    clear = np.where(active, np.abs(multipliers) * lengths > _MARGIN * forces, slack > _MARGIN * scale)
    clear[:, :first] |= data.equal[:, :first]
    fulfilled = np.where(held, np.abs(slack), -slack) <= _EXACT * scale
    fulfilled &= ~active | data.equal | (nearer == (multipliers > 0))
    dual = np.abs(gradient).max(1, initial=0.0)
    near = ended & clear.all(1)
    solved = near & fulfilled.all(1) & (dual <= _EXACT * forces[:, 0])
    wrong = np.where(data.equal, np.abs(slack), -slack).max(1, initial=0.0)
    gap = np.abs((slope * x).sum(1) + (multipliers * np.where(active, limit, 0.0)).sum(1))
    point = KKTPoint(torch.from_numpy(x), torch.from_numpy(rows[:, data.m :]), torch.from_numpy(rows[:, : data.m]), *bounds)
    return NativeResult(point, *map(torch.from_numpy, (solved, near & ~solved, wrong, dual, gap, iterations)))
