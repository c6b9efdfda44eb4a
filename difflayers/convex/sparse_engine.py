r"""The engine for sparse quadratic programs: a compiled interior-point method, an exact solve on its active set, proofs of the rest.

Clarabel follows the central path to a moderate tolerance. Its guess of the active set is solved exactly and corrected where multipliers or
slacks come out with the wrong sign (a primal-dual active-set method); the optimality conditions, measured here in the data as given,
decide whether the result is a solution. If not, Clarabel runs again, tight. What remains is put to the proof as in
:mod:`~difflayers.convex.certificates`: a certificate, Clarabel's own or one from an auxiliary problem that always has a solution, counts
only if it is verified here.

References:
    P. Goulart, Y. Chen, Clarabel: an interior-point solver for conic programs with quadratic objectives (2024), arXiv:2405.12762.
    M. Hintermüller, K. Ito, K. Kunisch, The primal-dual active set strategy as a semismooth Newton method, SIAM J. Optim. 13 (2002).
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np

from ..solution import Status
from .certificates import REACH
from .sparse_kkt import Array, Sparse, SparseError, SparseFactor, SparseKKT, SparsePoint, SparseQP, kkt_error, largest, stack_rows

__all__ = ["SparseResult", "solve_one"]

_FIRST, _TIGHT = 1e-8, 1e-11  # Clarabel's tolerances
_CORRECTIONS = 12  # exact solves for one guess of the active set
_EXACT = 1e-12  # a relative KKT error that no other active set can improve
_CANCELLED = 1e-9  # a sum that is smaller than this share of its terms may be rounding


class SparseResult(NamedTuple):
    """How one element ended: for DUAL_INFEASIBLE x is a ray, for PRIMAL_INFEASIBLE the multipliers are a Farkas certificate."""

    point: SparsePoint
    status: Status
    error: SparseError
    iterations: int
    factor: SparseFactor | None


def solve_one(
    problem: SparseQP, tol: float, max_iter: int, *, kkt: SparseKKT | None = None, start: SparsePoint | None = None, prove: bool = True
) -> SparseResult:
    """Solve one sparse QP.

    Args:
        problem: convex, without NaN.
        tol: relative KKT error of a solution.
        max_iter: limit of Clarabel's iterations.
        kkt: the equilibrated matrix, where the caller has it.
        start: a solution of a nearby problem; its active set is tried first.
        prove: whether to look for certificates.
    """
    kkt = SparseKKT(problem.P, problem.G, problem.A) if kkt is None else kkt
    best = _Best(problem, kkt, tol)
    if bool((problem.lb > problem.ub).any() | (problem.h == -np.inf).any() | (problem.lb == np.inf).any() | (problem.ub == -np.inf).any()):
        crossed = SparsePoint(*(np.zeros_like(part) for part in (problem.q, problem.b, problem.h, problem.q)))
        return SparseResult(crossed, Status.PRIMAL_INFEASIBLE, SparseError(np.inf, np.inf, np.inf, np.inf), 0, None)
    iterations = 0
    if start is not None:
        best.correct(start)
    for tolerance in (_FIRST, _TIGHT):
        if best.solved and best.factor is not None:  # a solution whose active set is not confirmed gets another try
            break
        found, claim, steps = _clarabel(problem, tolerance, max_iter)
        iterations += steps
        if claim is None:
            best.correct(found, patient=tolerance == _TIGHT)
        elif prove and (certified := _verified(problem, found, claim, tol, max_iter)) is not None:
            return certified._replace(iterations=iterations)
    if best.solved or not prove:
        return best.result(Status.SOLVED if best.solved else Status.MAX_ITER, iterations)
    certified = _proof(problem, tol, max_iter)
    return best.result(Status.MAX_ITER, iterations) if certified is None else certified._replace(iterations=iterations)


class _Best:
    """The best point that an active set of a problem has given so far."""

    def __init__(self, problem: SparseQP, kkt: SparseKKT, tol: float) -> None:
        self.problem, self.kkt, self.tol = problem, kkt, tol
        nothing = SparsePoint(*(np.zeros_like(part) for part in (problem.q, problem.b, problem.h, problem.q)))
        self.point, self.error, self.factor = nothing, kkt_error(problem, nothing)._replace(relative=np.inf), None
        self.fixed = problem.lb == problem.ub

    @property
    def solved(self) -> bool:
        return self.error.relative <= self.tol

    def result(self, status: Status, iterations: int) -> SparseResult:
        return SparseResult(self.point, status, self.error, iterations, self.factor)

    def correct(self, point: SparsePoint, *, patient: bool = False) -> None:
        """Solve the active set of ``point`` exactly, and those that its violated conditions suggest while they become fewer.

        ``patient`` goes on in any case: where constraints are weakly active, their number may rise before it falls.
        """
        if not all(np.isfinite(part).all() for part in point):
            return
        guess, changes = self.guess(point), point.x.size + point.z.size
        for turn in range(_CORRECTIONS):
            active, lower, upper = guess
            point = self._only_active(point, active, lower, upper)
            if turn == 0:
                self._offer(point, None)
            factor = self.kkt.factorize(active, lower | upper)
            point = self._on_active_set(point, factor, lower, upper)
            self._offer(point, factor)
            if self.error.relative <= _EXACT or not np.isfinite(point.x).all():
                return
            previous, guess = guess, self.guess(point)
            now = sum(int((new != old).sum()) for new, old in zip(guess, previous, strict=True))
            if now == 0 or (now >= changes and not patient):
                return
            changes = now

    def guess(self, point: SparsePoint) -> tuple[Array, Array, Array]:
        """Which rows and bounds are active: those whose multiplier outweighs the slack."""
        _, _, G, h, _, _, lb, ub = self.problem
        rows, box = self.kkt.stiffness
        active = (point.z > rows * (h - G @ point.x)) & np.isfinite(h)
        lower, upper = -point.z_box > box * (point.x - lb), point.z_box > box * (ub - point.x)
        upper = (upper & np.isfinite(ub)) | self.fixed
        return active, lower & np.isfinite(lb) & ~upper, upper

    def _only_active(self, point: SparsePoint, active: Array, lower: Array, upper: Array) -> SparsePoint:
        x = np.where(lower, self.problem.lb, np.where(upper, self.problem.ub, point.x))
        return SparsePoint(x, point.y, np.where(active, point.z, 0.0), np.where(lower | upper, point.z_box, 0.0))

    def _on_active_set(self, point: SparsePoint, factor: SparseFactor, lower: Array, upper: Array) -> SparsePoint:
        n, p = self.kkt.n, self.kkt.p
        rhs = np.concatenate((-self.problem.q, self.problem.b, np.where(factor.active, self.problem.h, 0.0)))
        solved, price, _ = factor.refine(rhs[:, None], np.concatenate((point.x, point.y, point.z))[:, None])
        x, y, z = np.split(solved[:, 0], (n, n + p))
        return SparsePoint(np.where(factor.pinned, point.x, x), y, z, np.where(factor.pinned, price[:, 0], 0.0))

    def _offer(self, point: SparsePoint, factor: SparseFactor | None) -> None:
        z_box = point.z_box
        z_box = np.where(self.fixed | (point.x != self.problem.lb), z_box, np.minimum(z_box, 0.0))
        z_box = np.where(self.fixed | (point.x != self.problem.ub), z_box, np.maximum(z_box, 0.0))
        point = point._replace(z=np.maximum(point.z, 0.0), z_box=z_box)
        error = kkt_error(self.problem, point)
        if error.relative < self.error.relative:
            self.point, self.error, self.factor = point, error, factor


def _clarabel(problem: SparseQP, tolerance: float, max_iter: int) -> tuple[SparsePoint, Status | None, int]:
    """A point, which is a certificate if Clarabel claims that there is no solution, and the iterations."""
    import scipy.sparse as sp

    clarabel: Any = importlib.import_module("clarabel")
    P, q, G, h, A, b, lb, ub = problem
    n, p = len(q), len(b)
    fixed, rows = np.flatnonzero(lb == ub), np.flatnonzero(np.isfinite(h))
    lower, upper = np.flatnonzero(np.isfinite(lb) & (lb != ub)), np.flatnonzero(np.isfinite(ub) & (lb != ub))
    eye = sp.eye_array(n, format="csr")
    parts = [(A, b), (eye[fixed], lb[fixed]), (G[rows], h[rows]), (-eye[lower], -lb[lower]), (eye[upper], ub[upper])]
    limits = np.concatenate([limit for _, limit in parts])
    cones = [clarabel.ZeroConeT(p + len(fixed)), clarabel.NonnegativeConeT(len(limits) - p - len(fixed))]
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.presolve_enable, settings.max_threads, settings.max_iter = False, False, 1, max_iter
    settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = tolerance
    settings.tol_infeas_rel = settings.tol_infeas_abs = 0.1 * tolerance  # tight, it has less cause to claim what is not so
    solver = clarabel.DefaultSolver(_matrix(sp.triu(P)), q, _matrix(stack_rows(*(matrix for matrix, _ in parts))), limits, cones, settings)
    found = solver.solve()
    y, fixed_pull, z_rows, at_lower, at_upper = np.split(np.array(found.z), np.cumsum([len(limit) for _, limit in parts])[:-1])
    z, z_box = np.zeros(len(h)), np.zeros(n)
    z[rows], z_box[fixed] = z_rows, fixed_pull
    z_box[lower] -= at_lower
    z_box[upper] += at_upper
    name = str(found.status)
    claim = next((status for text, status in _CLAIMS.items() if text in name), None)
    return SparsePoint(np.array(found.x), y, z, z_box), claim, int(found.iterations)


_CLAIMS = {"PrimalInfeasible": Status.PRIMAL_INFEASIBLE, "DualInfeasible": Status.DUAL_INFEASIBLE}


def _matrix(matrix: Any) -> Any:
    import scipy.sparse as sp

    return sp.csc_matrix(matrix)


def _verified(problem: SparseQP, point: SparsePoint, claim: Status, tol: float, max_iter: int) -> SparseResult | None:
    """The result that a claimed certificate proves, if it does."""
    if claim == Status.PRIMAL_INFEASIBLE:
        return _infeasible(problem, point) if _proves_infeasible(problem, point) else None
    if _proves_unbounded(problem, point.x) and _has_feasible_point(problem, np.zeros_like(point.x), tol, max_iter):
        return _unbounded(problem, point.x)
    return None


def _proof(problem: SparseQP, tol: float, max_iter: int) -> SparseResult | None:
    """The result that the solution of an auxiliary problem proves, if one does."""
    import scipy.sparse as sp

    P, q, G, h, A, b, lb, ub = problem
    n, p, m = len(q), len(b), len(h)
    A_unit, A_norms = _normalized(A)
    G_unit, G_norms = _normalized(G)
    eye, free = sp.eye_array(m + p, format="csr"), np.full(m + p, np.inf)
    violation = SparseQP(
        sp.block_diag((sp.csr_array((n, n)), eye), format="csr"),
        np.zeros(n + m + p),
        sp.hstack((G_unit, -eye[:m]), format="csr"),
        h / G_norms,
        sp.hstack((A_unit, -eye[m:]), format="csr"),
        b / A_norms,
        np.concatenate((lb, -free)),
        np.concatenate((ub, free)),
    )
    nearest = solve_one(violation, tol, max_iter, prove=False).point
    certificate = SparsePoint(nearest.x[:n], nearest.y / A_norms, nearest.z / G_norms, nearest.z_box[:n])
    if _proves_infeasible(problem, certificate):
        return _infeasible(problem, certificate)
    size = largest(q)
    recession = SparseQP(
        sp.eye_array(n, format="csr"),
        q / size if size > 0 else q,
        G_unit,
        np.where(np.isinf(h), h, 0.0),
        stack_rows(_normalized(P)[0], A_unit),
        np.zeros(n + p),
        np.where(np.isinf(lb), lb, 0.0),
        np.where(np.isinf(ub), ub, 0.0),
    )
    ray = solve_one(recession, tol, max_iter, prove=False).point.x
    if _proves_unbounded(problem, ray) and _has_feasible_point(problem, certificate.x, tol, max_iter):
        return _unbounded(problem, ray)
    return None


def _has_feasible_point(problem: SparseQP, near: Array, tol: float, max_iter: int) -> bool:
    import scipy.sparse as sp

    projection = problem._replace(P=sp.eye_array(len(near), format="csr"), q=-near)
    return solve_one(projection, tol, max_iter, prove=False).status == Status.SOLVED


def _infeasible(problem: SparseQP, certificate: SparsePoint) -> SparseResult:
    top = largest(*certificate[1:])
    point = SparsePoint(certificate.x, *(part / top for part in certificate[1:]))
    point = point._replace(z=np.maximum(point.z, 0.0))
    return SparseResult(point, Status.PRIMAL_INFEASIBLE, kkt_error(problem, point), 0, None)


def _unbounded(problem: SparseQP, ray: Array) -> SparseResult:
    point = SparsePoint(ray / largest(ray), np.zeros_like(problem.b), np.zeros_like(problem.h), np.zeros_like(ray))
    return SparseResult(point, Status.DUAL_INFEASIBLE, kkt_error(problem, point), 0, None)


def _proves_infeasible(problem: SparseQP, point: SparsePoint) -> bool:
    """As :func:`~difflayers.convex.certificates.proves_infeasible`."""
    _, _, G, h, A, b, lb, ub = problem
    z, (low, high) = np.maximum(point.z, 0), (np.maximum(-point.z_box, 0), np.maximum(point.z_box, 0))
    pull = A.T @ point.y + G.T @ z + high - low
    sides = ((b, point.y, _norms(A)), (h, z, _norms(G)), (-lb, low, np.ones_like(lb)), (ub, high, np.ones_like(ub)))
    if any((multipliers[np.isinf(limits)] > 0).any() for limits, multipliers, _ in sides[1:]):
        return False
    terms = np.concatenate([np.where(np.isinf(limits), 0.0, limits) * multipliers for limits, multipliers, _ in sides])
    forces = sum(float((abs(multipliers) * norms).sum()) for _, multipliers, norms in sides)
    value, total = -terms.sum(), abs(terms).sum()
    return bool(value > _CANCELLED * total and value * forces > REACH * total * largest(pull))


def _proves_unbounded(problem: SparseQP, ray: Array) -> bool:
    """As :func:`~difflayers.convex.certificates.proves_unbounded`."""
    P, q, G, h, A, _, lb, ub = problem
    length, fall, push = largest(ray), float(-q @ ray), largest(q)
    out = np.maximum(np.where(np.isinf(lb), 0.0, -ray), np.where(np.isinf(ub), 0.0, ray))
    leaving = max(
        largest(A @ ray / _norms(A)), float(np.where(np.isinf(h), 0.0, G @ ray / _norms(G)).max(initial=0.0)), float(out.max(initial=0.0))
    )
    curve = largest(P @ ray)
    return fall > 1e-6 * push * length and leaving * REACH <= length and curve * length * REACH <= fall * (1 + push)


def _norms(matrix: Sparse) -> Array:
    norms = np.sqrt(np.asarray((matrix * matrix).sum(axis=1)).ravel())
    return np.where(norms > 0, norms, 1.0)


def _normalized(matrix: Sparse) -> tuple[Sparse, Array]:
    import scipy.sparse as sp

    norms = _norms(matrix)
    return (sp.diags_array(1 / norms) @ matrix).tocsr(), norms
