"""From checked arguments to a :class:`QPSolution`: what the dense and the sparse problem have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..implicit.broadcasting import BroadcastingProblem
from ..implicit.closure import visible_to_modes
from ..implicit.function import ImplicitFunction
from ..solution import OnFailure, Status
from .kkt import Options, QPSolution, Sizes

__all__ = ["make_options", "solve_conditions", "with_both_bounds"]


def make_options(
    dtype: torch.dtype, *, solver: str, tol: float | None, max_iter: int, warm: bool, smoothing: float, on_failure: OnFailure
) -> Options:
    """The options of :func:`solve_qp` with defaults that follow the dtype of its arguments."""
    double = dtype == torch.float64
    tol = (1e-9 if double else 1e-6) if tol is None else tol
    return Options(solver, tol, max_iter, on_failure, 1e-9 if double else 1e-5, warm, smoothing)


def with_both_bounds(theta: Sequence[Tensor | None], sizes: Sizes, q: Tensor) -> list[Tensor | None]:
    """The arguments in float64; of a box with one side, the other one is infinite."""
    given = [None if part is None else part.to(torch.float64) for part in theta]
    if sizes.boxed:
        for side, infinity in ((6, -torch.inf), (7, torch.inf)):
            if given[side] is None:
                given[side] = torch.full((sizes.n,), infinity, dtype=torch.float64, device=q.device)
    return given


def solve_conditions(
    problem: BroadcastingProblem, sizes: Sizes, theta: Sequence[Tensor | None], warm_start: QPSolution | None, q: Tensor
) -> QPSolution:
    """Solve the optimality conditions, fill what failed as ``problem.on_failure`` says, and return it in the dtype of ``q``."""
    start, *values = visible_to_modes([sizes.start(warm_start, q), *theta])
    point, status, primal, dual, gap, iterations = ImplicitFunction.apply(problem, start.detach(), *values)
    if problem.on_failure != "raise":
        lost = status != Status.SOLVED if problem.on_failure == "nan" else status == Status.NUMERICAL_ERROR
        point = torch.where(lost.unsqueeze(-1), torch.nan, point)
    # The Function keeps its output for the derivatives; the caller's copy may be modified in place.
    x, y, z, z_box = sizes.split(point.to(q.dtype, copy=True))
    return QPSolution(x, y, z, z_box, status, primal.to(q.dtype), dual.to(q.dtype), gap.to(q.dtype), iterations)
