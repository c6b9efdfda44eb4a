r"""Which method finds the potentials, and from where.

Where ε is small beside the range of the cost, larger ε come first, each from the potentials of the one before; some sweeps there, and steps
of Newton's method where they leave too much, make sure that the next one begins near its solution. At ε itself the sweeps go on as
long as their rate of convergence promises that they are the faster way, and Newton's method takes over where it does not. A cloud that
is moved onto itself takes none of this (:mod:`~difflayers.transport.symmetric`).

Reference: Kosowsky and Yuille, The invisible hand algorithm: solving the assignment problem with statistical physics, Neural Networks 7
(1994), for the falling temperature.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .newton import newton
from .sparse_newton import sparse_newton
from .sweeps import STRIDE, Scaled, Swept, sweep
from .symmetric import is_symmetric, symmetric_sweep

__all__ = ["Method", "find_potentials"]

Method = Literal["auto", "sinkhorn", "newton", "sparse_newton"]

# The first ε as a fraction of the cost's range, and what the next one is of that.
_FIRST, _FACTOR = 0.01, 0.25

# The marginal error, relative to the mass, that Newton's method goes below before ε falls, and its most steps there.
_NEAR, _NEAR_STEPS = 3e-3, 50

# Where so many more sweeps are to come, Newton's method is the faster one (python -m benchmarks.transport), and from so many columns on
# the sparse one.
_PATIENCE: dict[Method, float] = {"newton": 150.0, "sparse_newton": 30.0}
_LARGE = 300

_SWEEPS, _STEPS = 10_000, 200


def find_potentials(problem: Scaled, tol: Tensor, *, method: Method, max_iter: int | None) -> Swept:
    """The potentials of each problem; whether the error is within ``tol`` is for the caller to see.

    Args:
        problem: N problems in units of ε, best with no more columns than rows.
        tol: ``(N,)``, the marginal error (1-norm) to reach.
        method: as in :func:`~difflayers.transport.sinkhorn`.
        max_iter: most sweeps at ε itself, and most Newton steps.
    """
    if method != "auto" or problem.slack is not None:
        return _search(problem, tol, method, max_iter)
    symmetric = is_symmetric(problem).nonzero().squeeze(-1)
    if not symmetric.numel():
        return _search(problem, tol, method, max_iter)
    part = symmetric_sweep(problem.take(symmetric), tol[symmetric])
    found = Swept(
        torch.zeros_like(problem.a),
        torch.zeros_like(problem.b),
        torch.full_like(tol, torch.inf),
        tol.new_zeros(tol.shape, dtype=torch.int64),
    )
    _put(found, symmetric, part)
    left = (~(found.error <= tol)).nonzero().squeeze(-1)
    if left.numel():
        _put(found, left, _search(problem.take(left), tol[left], method, max_iter))
    return found


def _put(found: Swept, index: Tensor, part: Swept) -> None:
    for target, source in zip(found, part, strict=True):
        target[index] = source


def _search(problem: Scaled, tol: Tensor, method: Method, max_iter: int | None) -> Swept:
    patience = math.inf if method == "sinkhorn" else -1.0
    if method == "auto":
        method = "sparse_newton" if problem.b.shape[-1] >= _LARGE and problem.slack is None else "newton"
        patience = _PATIENCE[method]
    gamma, before = _anneal(problem, method)
    found = sweep(problem, gamma, tol, max_iter=max_iter or _SWEEPS, patience=patience)
    _finish(found, problem, tol, max_iter or _STEPS, method)
    return found._replace(iterations=found.iterations + before)


def _anneal(problem: Scaled, method: Method) -> tuple[Tensor, Tensor]:
    """γ ``(N, m)`` to start from, and the iterations that took."""
    spread = problem.X.amax((-1, -2)) - problem.X.amin((-1, -2))
    levels = (torch.log(spread * _FIRST) / -math.log(_FACTOR)).ceil().clamp(min=0).to(torch.int64)
    gamma, iterations = torch.zeros_like(problem.b), torch.zeros_like(levels)
    for remaining in range(int(levels.max()), 0, -1):
        index = (levels >= remaining).nonzero().squeeze(-1)
        part = problem.take(index)
        larger = spread[index] * _FIRST * _FACTOR ** (levels[index] - remaining)
        slack = None if part.slack is None else part.slack * larger[:, None]
        part = part._replace(X=part.X / larger[:, None, None], slack=slack)
        near = _NEAR * part.a.sum(-1)
        found = sweep(part, gamma[index] / larger[:, None], near, max_iter=STRIDE, patience=math.inf)
        _finish(found, part, near, _NEAR_STEPS, method)
        gamma[index] = found.gamma * larger[:, None]
        iterations[index] += found.iterations
    return gamma, iterations


def _finish(found: Swept, problem: Scaled, tol: Tensor, max_iter: int, method: Method) -> None:
    """Newton's method for the elements that the sweeps have left, in the places of theirs; its iterations come on top."""
    for solver in {"sinkhorn": (), "newton": (newton,), "sparse_newton": (sparse_newton, newton)}[method]:
        left = (~(found.error <= tol)).nonzero().squeeze(-1)
        if not left.numel():
            break
        start = found.gamma[left].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        better = solver(problem.take(left), start, tol[left], max_iter=max_iter)
        better = better._replace(iterations=better.iterations + found.iterations[left])
        _put(found, left, better)
