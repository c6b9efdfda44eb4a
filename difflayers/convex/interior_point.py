r"""The robust engine for batches of dense convex QPs: every element solved, proved infeasible, proved unbounded, or said to have failed.

The central path (`central_path`) finds solutions and the optimality conditions, measured in the data as given, decide whether they are
ones. What remains unsolved is put to the proof: three auxiliary QPs that always have solutions (`certificates`), solved by the same
method, tell an infeasible problem from an unbounded one and from one that only was too hard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..solution import Status
from .active_set import ActiveSetFactor
from .central_path import CentralPath, Outcome
from .certificates import (
    feasibility_problem,
    infeasibility_certificate,
    nearest_point_problem,
    proves_infeasible,
    proves_unbounded,
    recession_problem,
)
from .normal_equations import ABSENT, DenseQP, KKTError, KKTPoint, MaybeTensor, each, kkt_error

__all__ = ["DenseQP", "DenseResult", "KKTPoint", "replaced", "screen", "solve_dense", "without_huge_limits"]

_MEMORY = 1 << 30  # bytes that the working copies of one part of a batch may take


class DenseResult(NamedTuple):
    """The solution of a batch: the point, how it ended, and the factor of its active set.

    Attributes:
        x: ``(B, n)``; for DUAL_INFEASIBLE the ray along which the objective falls; NaN for NUMERICAL_ERROR.
        y: ``(B, p)`` multipliers of the equalities; for PRIMAL_INFEASIBLE the multipliers are a Farkas certificate.
        z: ``(B, m)`` ≥ 0.
        z_lower: ``(B, n)`` ≥ 0, or None without bounds.
        z_upper: ``(B, n)`` ≥ 0, or None without bounds.
        status: ``(B,)`` int64 codes of :class:`Status`, decided by the measured optimality conditions or a verified certificate.
        primal_residual: ``(B,)`` largest violation of a constraint.
        dual_residual: ``(B,)`` largest entry of the gradient of the Lagrangian.
        duality_gap: ``(B,)``.
        iterations: ``(B,)`` int64.
        factor: solves with the derivative of the optimality conditions at the solution; of no meaning where the status is not SOLVED, and
            None from an engine that does not end with one.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    z_lower: MaybeTensor
    z_upper: MaybeTensor
    status: Tensor
    primal_residual: Tensor
    dual_residual: Tensor
    duality_gap: Tensor
    iterations: Tensor
    factor: ActiveSetFactor | None


def solve_dense(problem: DenseQP, *, tol: float = 1e-9, max_iter: int = 100, start: KKTPoint | None = None) -> DenseResult:
    """Solve a batch of dense convex QPs.

    Args:
        problem: the batch, in float64. Limits of size 1e20 and beyond count as infinite.
        tol: the KKT error of a solution, relative to one plus the size of the terms that it adds up, at most. An active set that is
            solved exactly reaches about 1e-14.
        max_iter: limit of the interior point iterations.
        start: a solution of nearby problems; its active set is tried first, and costs one factorization where it still holds.

    Returns:
        The solution, with one status per element.

    Example:
        >>> import torch
        >>> point = torch.tensor([[0.9, 0.6, -0.2]], dtype=torch.float64)
        >>> ones, zeros = torch.ones_like(point), torch.zeros_like(point)
        >>> rows = ones.unsqueeze(1)
        >>> simplex = DenseQP(torch.diag_embed(ones), -point, rows[:, :0], ones[:, :0], rows, ones[:, :1], zeros, ones)
        >>> result = solve_dense(simplex)
        >>> result.x.round(decimals=6).tolist(), result.status.tolist()
        ([[0.65, 0.35, 0.0]], [0])
    """
    with torch.no_grad():
        problem = without_huge_limits(problem)
        unusable = screen(problem)
        outcome = Outcome(problem if unusable is None else replaced(problem, unusable[0] | unusable[1]))
        error = _follow(outcome, torch.arange(problem.q.shape[0], device=problem.q.device), tol, max_iter, start=start, strict=False)
        status = torch.where(error.relative <= tol, int(Status.SOLVED), int(Status.MAX_ITER))
        if bool((status != Status.SOLVED).any()):
            left = _classify(outcome, status, tol, max_iter)
            if left.numel():
                error = _follow(outcome, left, tol, max_iter)
                status[left] = torch.where(error.relative[left] <= tol, int(Status.SOLVED), int(Status.MAX_ITER))
        if unusable is not None:
            _mark_unusable(problem, outcome.point, error, status, *unusable)
        return DenseResult(*outcome.point, status, *error[:3], outcome.iterations, outcome.factor)


def without_huge_limits(problem: DenseQP) -> DenseQP:
    """The same problem, in which limits of size 1e20 and beyond are infinite."""
    h, lb, ub = problem.h, problem.lb, problem.ub
    h = torch.where(h >= ABSENT, torch.inf, h)
    if lb is not None and ub is not None:
        lb, ub = torch.where(lb <= -ABSENT, -torch.inf, lb), torch.where(ub >= ABSENT, torch.inf, ub)
    return problem._replace(h=h, lb=lb, ub=ub)


def _follow(outcome: Outcome, ids: Tensor, tol: float, max_iter: int, *, start: KKTPoint | None = None, strict: bool = True) -> KKTError:
    """Follow the central paths of the elements ``ids``, in parts that fit in memory, and measure where all the elements are then."""
    rows, n = outcome.equations.rows.shape[1:]
    memory = 8 * n * (4 * n + 3 * rows)
    for part in ids.split(max(_MEMORY // max(memory, 1), 1)):
        path = CentralPath(outcome, part, tol, max_iter, strict=strict)
        if start is not None:
            path.resume(KKTPoint(*each(lambda t, part=part: t[part], start)))
        path.follow()
    return kkt_error(outcome.problem, outcome.point)


def screen(problem: DenseQP) -> tuple[Tensor, Tensor] | None:
    """Elements whose limits contradict each other by themselves, and elements with data that are not numbers; None if there are none."""
    P, q, G, h, A, b, lb, ub = problem
    sound = torch.isfinite(P.sum() + q.sum() + G.sum() + A.sum() + b.sum()) & (h > -torch.inf).all()
    if lb is not None and ub is not None:
        sound = sound & ((lb <= ub) & (lb < torch.inf) & (ub > -torch.inf)).all()
    if bool(sound):
        return None
    broken, impossible = h.isnan().any(-1), h.isneginf().any(-1)
    for tensor in (P, q, G, A, b):
        broken = broken | ~torch.isfinite(tensor).flatten(1).all(-1)
    if lb is not None and ub is not None:
        broken = broken | (lb.isnan() | ub.isnan()).any(-1)
        impossible = impossible | ((lb > ub) | lb.isposinf() | ub.isneginf()).any(-1)
    return impossible & ~broken, broken


def replaced(problem: DenseQP, dropped: Tensor) -> DenseQP:
    """The ``dropped`` elements become an easy problem, their own numbers being of no use."""
    easy = {"P": 0.0, "q": 0.0, "G": 0.0, "h": 1.0, "A": 0.0, "b": 0.0, "lb": -1.0, "ub": 1.0}
    fields: dict[str, Tensor] = {}
    for name, value in easy.items():
        tensor = getattr(problem, name)
        if tensor is not None and tensor.shape[0] < dropped.shape[0]:
            fields[name] = torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)  # what is shared broke every element
        elif tensor is not None:
            fields[name] = torch.where(dropped.view(-1, *(1,) * (tensor.dim() - 1)), value, tensor)
    return DenseQP(**fields)


def _classify(outcome: Outcome, status: Tensor, tol: float, max_iter: int) -> Tensor:
    """Prove the unsolved elements infeasible or unbounded where they are, in ``status`` and in the point; returns the others."""
    left = (status != Status.SOLVED).nonzero().squeeze(-1)
    problem = outcome.problem.take(left)
    violation, _ = _solution(feasibility_problem(problem), tol, max_iter)
    certificate = infeasibility_certificate(problem, violation)
    infeasible = proves_infeasible(problem, certificate)
    status[left[infeasible]] = int(Status.PRIMAL_INFEASIBLE)
    for target, source in zip(outcome.point, certificate, strict=True):
        if target is not None and source is not None:
            target[left[infeasible]] = source[infeasible]
    maybe = (~infeasible).nonzero().squeeze(-1)
    if maybe.numel():
        problem = problem.take(maybe)
        ray = _solution(recession_problem(problem), tol, max_iter)[0].x
        feasible = _solution(nearest_point_problem(problem, certificate.x[maybe]), tol, max_iter)[1].relative <= tol
        unbounded = feasible & proves_unbounded(problem, ray)
        index = left[maybe[unbounded]]
        status[index] = int(Status.DUAL_INFEASIBLE)
        outcome.point.x[index] = ray[unbounded] / ray[unbounded].abs().amax(-1, keepdim=True)
    return left[status[left] == Status.MAX_ITER]


def _solution(problem: DenseQP, tol: float, max_iter: int) -> tuple[KKTPoint, KKTError]:
    outcome = Outcome(problem)
    error = _follow(outcome, torch.arange(problem.q.shape[0], device=problem.q.device), tol, max_iter)
    return outcome.point, error


def _mark_unusable(problem: DenseQP, point: KKTPoint, error: KKTError, status: Tensor, impossible: Tensor, broken: Tensor) -> None:
    """Say of the elements that were replaced why they have no solution."""
    status[impossible], status[broken] = int(Status.PRIMAL_INFEASIBLE), int(Status.NUMERICAL_ERROR)
    if problem.lb is not None and problem.ub is not None:
        crossed = (problem.lb > problem.ub).to(problem.q.dtype)
        point.z_lower[impossible], point.z_upper[impossible] = crossed[impossible], crossed[impossible]
    for tensor in (*point, *error):
        if tensor is not None:
            tensor[broken] = torch.nan
    for tensor in error:
        tensor[impossible] = torch.inf
