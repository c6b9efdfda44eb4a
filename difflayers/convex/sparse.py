r"""Quadratic programs with sparse P, G and A: the same conditions and answers as the dense engine's, and nothing dense of size n².

.. math:: \min_x \tfrac12 x^T P x + q^T x \quad\text{subject to}\quad G x \le h,\; A x = b,\; l \le x \le u.

The patterns are constants of the problem, the values of the stored entries its arguments. :mod:`~difflayers.convex.sparse_engine` finds the
solution; the optimality conditions F of :mod:`~difflayers.convex.kkt` are written with gathers and sums over the entries, so that
derivatives stay on the pattern: the entry (i, j) of P has the gradient :math:`\tfrac12 (u_i x_j + x_i u_j)` with the adjoint u, that of G
:math:`u^z_i x_j + z_i u_j`. The systems with ∂F/∂x use one sparse factor of the active set (:mod:`~difflayers.convex.sparse_kkt`), for
backward, double backward and forward mode alike. Elements of a batch are solved one by one, in as many threads as torch has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..implicit.broadcasting import BroadcastingProblem
from ..solution import OnFailure, Solution, Status, report_failures
from .kkt import SINGULAR_ABOVE, Options, QPSolution, Sizes, active_sides
from .normal_equations import ABSENT
from .qp_call import make_options, solve_conditions, with_both_bounds
from .sparse_engine import SparseResult, solve_one
from .sparse_kkt import Array, SparseError, SparseFactor, SparseKKT, SparsePoint, SparseQP, is_convex
from .sparse_matrix import SparseMatrix, sparse_matrix

__all__ = ["SparseKKTProblem", "solve_sparse"]

Pattern = Any  # (2, nnz) indices of a matrix, or None


def solve_sparse(
    arguments: Sequence[Tensor | SparseMatrix | None],
    validate: Callable[[Sequence[Tensor | None]], Sizes],
    *,
    tol: float | None,
    max_iter: int | None,
    warm_start: QPSolution | None,
    on_failure: OnFailure,
) -> QPSolution:
    """:func:`solve_qp` where any of P, G and A is sparse.

    Args:
        arguments: P, q, G, h, A, b, lb, ub.
        validate: checks shapes, dtypes and devices of dense arguments.
        tol: as in :func:`solve_qp`, and so the rest.
        max_iter: iterations of the interior-point method; None: 200.
        warm_start: the solution of a similar problem.
        on_failure: what becomes of elements without a solution.
    """
    given: list[Any] = list(arguments)
    matrices = {place: sparse_matrix(given[place], name) for place, name in ((0, "P"), (2, "G"), (4, "A")) if given[place] is not None}
    sizes = validate([_stand_in(matrices[place]) if place in matrices else part for place, part in enumerate(given)])
    q: Tensor = given[1]
    options = make_options(
        q.dtype,
        solver="auto",
        tol=tol,
        max_iter=200 if max_iter is None else max_iter,
        warm=warm_start is not None,
        smoothing=0.0,
        on_failure=on_failure,
    )
    P, G, A = (matrices[place].indices if place in matrices else None for place in (0, 2, 4))
    theta = [matrices[place].values if place in matrices else part for place, part in enumerate(given)]
    problem = SparseKKTProblem(sizes, options, (P, G, A))
    return solve_conditions(problem, sizes, with_both_bounds(theta, sizes, q), warm_start, q)


def _stand_in(matrix: SparseMatrix) -> Tensor:
    """A dense tensor of the shape of a sparse matrix, without its memory."""
    values = matrix.values
    return torch.zeros((), dtype=values.dtype, device=values.device).expand(*values.shape[:-1], *matrix.shape)


class SparseKKTProblem(BroadcastingProblem):
    """The KKT conditions as a root problem in the values of fixed patterns; every argument is a vector ``(*batch, ·)`` and broadcasts."""

    core_ndims = (1,) * 8

    def __init__(self, sizes: Sizes, options: Options, patterns: tuple[Pattern, Pattern, Pattern]) -> None:
        residual = functools.partial(_residual, sizes, patterns)
        super().__init__(len(sizes.batch), residual=residual, on_failure=options.on_failure)
        self.sizes, self.options, self.patterns = sizes, options, patterns

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """Solve every element, report the failures, and keep the factors of the active sets."""
        batch = self.sizes.batch
        if 0 in batch:
            status = torch.zeros(batch, dtype=torch.int64, device=x0.device)
            return (x0.clone(), status, *x0.new_zeros(3, *batch), status.clone())
        elements = _Elements(theta, self.sizes, self.patterns)
        rows = x0.detach().reshape(-1, x0.shape[-1]).cpu().numpy()
        found = _in_threads(lambda i: self._solve(elements, i, self._point(rows[i]) if self.options.warm else None), len(elements))
        points = np.stack([self._row(result.point) for result in found])
        measures = [
            torch.tensor([function(result) for result in found], dtype=dtype, device=x0.device).reshape(batch)
            for function, dtype in (
                (lambda result: int(result.status), torch.int64),
                (lambda result: result.error.primal, torch.float64),
                (lambda result: result.error.dual, torch.float64),
                (lambda result: result.error.gap, torch.float64),
                (lambda result: result.iterations, torch.int64),
            )
        ]
        point = torch.from_numpy(points).to(x0.device).reshape(*batch, -1)
        report_failures(QPSolution(*self.sizes.split(point), *measures), "solve_qp", self.on_failure)
        known = [result.factor for result in found]
        self._factor = _Factors(self.sizes, elements, np.nan_to_num(points, nan=0.0, posinf=0.0, neginf=0.0), known)
        return (torch.nan_to_num(point, nan=0.0, posinf=0.0, neginf=0.0), *measures)

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        """Solve with the KKT matrix of the active set, or its transpose."""
        w, *theta = point
        if rhs.numel() == 0:
            status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
            return Solution(torch.zeros_like(rhs), status, rhs.new_zeros(rhs.shape[:-1]), status)
        if self._factor is None:
            rows = w.detach().reshape(-1, w.shape[-1]).cpu().numpy()
            self._factor = _Factors(self.sizes, _Elements(theta, self.sizes, self.patterns), rows, [None] * len(rows))
        right = rhs.detach().reshape(*rhs.shape[: int(columns)], -1, rhs.shape[-1])
        right = (right if columns else right.unsqueeze(0)).permute(1, 2, 0).cpu().numpy()
        solved = _in_threads(lambda i: self._factor.solve(i, right[i], transpose), len(right))
        x = torch.from_numpy(np.stack([part for part, _ in solved])).permute(2, 0, 1).reshape(rhs.shape).to(rhs.device)
        residual = torch.from_numpy(np.stack([part for _, part in solved])).mT.reshape(rhs.shape[:-1]).to(rhs.device)
        status = torch.where(residual <= SINGULAR_ABOVE, int(Status.SOLVED), int(Status.SINGULAR))
        return Solution(x, status, residual, torch.zeros_like(status))

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> list[Tensor]:
        """(∂F/∂θ)ᵀ u in closed form, entry by entry."""
        lb, ub = theta[6:]
        x, y, z, z_box = self.sizes.split(x)
        u_x, u_y, u_z, u_box = self.sizes.split(u)
        u_z = torch.where(z > 0, u_z, 0)
        lower, upper = (z > 0, z > 0) if z_box is None else active_sides(z_box, lb, ub)
        P, G, A = self.patterns
        closed = (
            lambda: (_entries(P, u_x, x) + _entries(P, x, u_x)) / 2,
            lambda: u_x,
            lambda: _entries(G, u_z, x) + _entries(G, z, u_x),
            lambda: -u_z,
            lambda: _entries(A, u_y, x) + _entries(A, y, u_x),
            lambda: -u_y,
            lambda: torch.where(lower, -u_box, 0),
            lambda: torch.where(upper, -u_box, 0),
        )
        return [closed[i]().sum_to_size(theta[i].shape) for i in which]

    def deeper(self, size: int) -> SparseKKTProblem:
        """The same problem with one more leading dimension."""
        return SparseKKTProblem(self.sizes._replace(batch=(size, *self.sizes.batch)), self.options, self.patterns)

    def _solve(self, elements: _Elements, i: int, start: SparsePoint | None) -> SparseResult:
        problem = elements[i]
        numbers = (problem.P.data, problem.q, problem.G.data, problem.A.data, problem.b)
        broken = any(np.isnan(part).any() for part in (problem.h, problem.lb, problem.ub)) or not all(np.isfinite(n).all() for n in numbers)
        if broken or not elements.is_convex(i, self.options.rounding):
            lost = SparsePoint(*(np.full(len(part), np.nan) for part in (problem.q, problem.b, problem.h, problem.q)))
            return SparseResult(lost, Status.NUMERICAL_ERROR, SparseError(np.nan, np.nan, np.nan, np.nan), 0, None)
        return solve_one(problem, self.options.tol, self.options.max_iter, kkt=elements.kkt(i), start=start)

    def _point(self, row: Array) -> SparsePoint:
        n, p, m = self.sizes.n, self.sizes.p, self.sizes.m
        x, y, z, z_box = np.split(row, (n, n + p, n + p + m))
        return SparsePoint(x, y, z, z_box if self.sizes.boxed else np.zeros(n))

    def _row(self, point: SparsePoint) -> Array:
        return np.concatenate(point if self.sizes.boxed else point[:3])


class _Elements:
    """The problems of a batch, one by one, in NumPy and SciPy; what the batch shares is there once."""

    def __init__(self, theta: Sequence[Any], sizes: Sizes, patterns: tuple[Pattern, Pattern, Pattern]) -> None:
        P, q, G, h, A, b, lb, ub = theta
        self.sizes, self._count = sizes, math.prod(sizes.batch)
        n = sizes.n
        self._P = [(matrix + matrix.T) / 2 for matrix in self._matrices(P, patterns[0], n)]
        self._G, self._A = self._matrices(G, patterns[1], sizes.m), self._matrices(A, patterns[2], sizes.p)
        self._q, self._h, self._b = self._vectors(q, n), self._vectors(h, sizes.m), self._vectors(b, sizes.p)
        self._lb, self._ub = (
            self._vectors(side, n) if sizes.boxed else np.full((self._count, n), infinity)
            for side, infinity in ((lb, -np.inf), (ub, np.inf))
        )
        self._h = np.where(self._h >= ABSENT, np.inf, self._h)
        self._lb, self._ub = np.where(self._lb <= -ABSENT, -np.inf, self._lb), np.where(self._ub >= ABSENT, np.inf, self._ub)
        self._kkt: dict[int, SparseKKT] = {}
        self._convex: dict[int, bool] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> SparseQP:
        P, G, A = (matrices[i % len(matrices)] for matrices in (self._P, self._G, self._A))
        return SparseQP(P, self._q[i], G, self._h[i], A, self._b[i], self._lb[i], self._ub[i])

    def kkt(self, i: int) -> SparseKKT:
        """The equilibrated matrix of element i."""
        key = i % max(len(self._P), len(self._G), len(self._A))
        if key not in self._kkt:
            self._kkt[key] = SparseKKT(*(matrices[i % len(matrices)] for matrices in (self._P, self._G, self._A)))
        return self._kkt[key]

    def is_convex(self, i: int, rounding: float) -> bool:
        """Whether P of element i is positive semidefinite."""
        key = i % len(self._P)
        if key not in self._convex:
            self._convex[key] = is_convex(self._P[key], rounding)
        return self._convex[key]

    def _matrices(self, values: Tensor | None, pattern: Pattern, rows: int) -> list[Any]:
        import scipy.sparse as sp

        shape = rows, self.sizes.n
        if values is None:
            return [sp.csr_array(shape)]
        indices = pattern.cpu().numpy()
        if values.numel() == values.shape[-1]:
            return [sp.csr_array((values.reshape(-1).detach().cpu().numpy(), tuple(indices)), shape=shape)]
        whole = self._vectors(values, values.shape[-1])
        return [sp.csr_array((row, tuple(indices)), shape=shape) for row in whole]

    def _vectors(self, value: Tensor | None, length: int) -> Array:
        if value is None:
            return np.zeros((self._count, length))
        return value.detach().expand(*self.sizes.batch, length).reshape(self._count, length).cpu().numpy()


class _Factors:
    """The Jacobians of F at the points of a batch, each factorized when it is first needed; equal active sets share a factor."""

    def __init__(self, sizes: Sizes, elements: _Elements, points: Array, known: list[SparseFactor | None]) -> None:
        self.sizes, self.elements, self.known = sizes, elements, known
        n, p, m = sizes.n, sizes.p, sizes.m
        z_box = points[:, n + p + m :] if sizes.boxed else np.zeros((len(points), n))
        self.active, self.lower, self.upper = points[:, n + p : n + p + m] > 0, z_box < 0, z_box > 0
        self.upper |= (z_box == 0) & (elements._lb == elements._ub)
        self._made: dict[tuple[int, bytes], SparseFactor] = {}

    def solve(self, i: int, rhs: Array, transpose: bool) -> tuple[Array, Array]:
        """Solve with the Jacobian of element i or its transpose for ``(N, R)`` right-hand sides; the solutions and ``(R,)`` residuals."""
        n, p, m = self.sizes.n, self.sizes.p, self.sizes.m
        factor, problem = self._factor(i), self.elements[i]
        x, y, z, box = np.split(rhs, (n, n + p, n + p + m))
        active, pinned = self.active[i][:, None], (self.lower | self.upper)[i][:, None]
        box = box if self.sizes.boxed else np.zeros_like(x)
        w_z, w_box = np.where(active, 0.0, z), np.where(pinned, 0.0, box)
        force = x if transpose else x - problem.G.T @ w_z - w_box  # the given inactive multipliers load the stationarity rows
        start = np.concatenate((np.where(pinned, box, 0.0), np.zeros_like(y), np.zeros_like(z)))
        solved, price, residual = factor.refine(np.concatenate((force, y, np.where(active, z, 0.0))), start)
        u_x, u_y, u_z = np.split(solved, (n, n + p))
        if transpose:
            w_z, w_box = w_z - np.where(active, 0.0, problem.G @ u_x), w_box - np.where(pinned, 0.0, u_x)
        parts = [u_x, u_y, u_z + w_z]
        if self.sizes.boxed:
            parts.append(np.where(pinned, price, w_box))
        return np.concatenate(parts), residual

    def _factor(self, i: int) -> SparseFactor:
        active, pinned = self.active[i], (self.lower | self.upper)[i]
        factor = self.known[i]
        if factor is None or not (np.array_equal(factor.active, active) and np.array_equal(factor.pinned, pinned)):
            kkt = self.elements.kkt(i)
            key = id(kkt), np.packbits(np.concatenate((active, pinned))).tobytes()
            if key not in self._made:
                self._made[key] = kkt.factorize(active, pinned)
            factor = self.known[i] = self._made[key]
        return factor


def _residual(sizes: Sizes, patterns: tuple[Pattern, Pattern, Pattern], w: Tensor, *theta: Any) -> Tensor:
    P, q, G, h, A, b, lb, ub = theta
    x, y, z, z_box = sizes.split(w)
    n = sizes.n
    gradient = q
    if P is not None:
        i, j = patterns[0]
        gradient = gradient + (_sum_entries(P, x, i, j, n) + _sum_entries(P, x, j, i, n)) / 2
    rows = []
    if A is not None:
        i, j = patterns[2]
        gradient = gradient + _sum_entries(A, y, j, i, n)
        rows.append(_sum_entries(A, x, i, j, sizes.p) - b)
    if G is not None:
        i, j = patterns[1]
        gradient = gradient + _sum_entries(G, z, j, i, n)
        rows.append(torch.where(z > 0, _sum_entries(G, x, i, j, sizes.m) - h, z))
    if z_box is not None:
        gradient = gradient + z_box
        lower, upper = active_sides(z_box, lb, ub)
        rows.append(torch.where(upper, x - ub, torch.where(lower, x - lb, z_box)))
    return torch.cat([gradient.expand_as(x), *rows], -1)


def _sum_entries(values: Tensor, vector: Tensor, rows: Tensor, columns: Tensor, length: int) -> Tensor:
    """The matrix with these entries times the vector ``(*batch, ·)``."""
    terms = values * vector[..., columns]
    return torch.zeros(*terms.shape[:-1], length, dtype=terms.dtype, device=terms.device).index_add(-1, rows, terms)


def _entries(pattern: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The entries of the outer product left rightᵀ on the pattern."""
    return left[..., pattern[0]] * right[..., pattern[1]]


def _in_threads(function: Callable[[int], Any], count: int) -> list[Any]:
    workers = min(count, torch.get_num_threads())
    if workers <= 1:
        return [function(i) for i in range(count)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, range(count)))
