r"""The optimality conditions of a quadratic program, as the root problem that the core differentiates.

With multipliers y of the equalities, z ≥ 0 of the inequalities and w of the bounds (negative at a lower one, positive at an upper one), a
feasible point is optimal if and only if

.. math:: F(x, y, z, w) = \begin{pmatrix} P x + q + A^T y + G^T z + w \\ A x - b \\
          (G x - h)_i \text{ if } z_i > 0, \text{ else } z_i \\
          (x - u)_j \text{ if } w_j > 0,\; (x - l)_j \text{ if } w_j < 0, \text{ else } w_j \end{pmatrix} = 0.

The engine ends with an exact solve on the active set, so that inactive multipliers are exactly zero and z > 0 says which rows are active.
The Jacobian of F is then the KKT matrix of the active set. It is factorized once: the engine's last factor serves backward,
double backward and jvp. F is linear in the unknowns and in each argument, so its pullback is a handful of outer products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError
from ..implicit.broadcasting import BroadcastingProblem
from ..solution import OnFailure, Solution, Status, report_failures
from .active_set import ActiveSetFactor
from .interior_point import DenseResult, solve_dense
from .native import NativeResult, certify, is_available, solve_native
from .normal_equations import DenseQP, KKTPoint, MaybeTensor, each
from .reduced import ReducedFactor, TinyFactor

__all__ = ["CORE_NDIMS", "SINGULAR_ABOVE", "KKTProblem", "Options", "QPSolution", "Sizes", "active_sides"]
__all__ += ["flat_problem", "stationarity", "times"]

# Dimensions of P, q, G, h, A, b, lb, ub without the batch.
CORE_NDIMS = (2, 1, 2, 1, 2, 1, 1, 1)

# A linearized system that the active-set factor leaves with a larger relative residual has no solution there.
SINGULAR_ABOVE = 1e-7

# A larger relative residual of a regular system says that it was not so regular.
_ACCURATE = 1e-11

# Entries of the whole Jacobian, of at most four elements, up to which it is factorized as it is.
_TINY = 1 << 14

# Entries of P up to which a part of the batch is factorized at once.
_CACHED = 1 << 18

# Entries of the matrices, of at most 32 elements, from which on a warm start costs less than a cold one.
_RESUMED = 1e5

# Unknowns up to which the compiled active-set method is the faster engine (python -m benchmarks.qp).
_NATIVE_BELOW = 400


class QPSolution(NamedTuple):
    """What :func:`solve_qp` returns; x, y, z and z_box are differentiable.

    Attributes:
        x: ``(*batch, n)``, the minimizer.
        y: ``(*batch, p)``, multipliers of A x = b.
        z: ``(*batch, m)``, multipliers of G x ≤ h, nonnegative.
        z_box: ``(*batch, n)``, multipliers of the bounds: negative at a lower, positive at an upper one; None without bounds.
        status: ``(*batch,)`` codes of :class:`~difflayers.Status`.
        primal_residual: ``(*batch,)``, the largest violation of a constraint.
        dual_residual: ``(*batch,)``, the largest entry of the gradient of the Lagrangian.
        duality_gap: ``(*batch,)``, ``|xᵀPx + qᵀx + bᵀy + hᵀz + bound terms|``.
        iterations: ``(*batch,)`` int64.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    z_box: Tensor | None
    status: Tensor
    primal_residual: Tensor
    dual_residual: Tensor
    duality_gap: Tensor
    iterations: Tensor


class Sizes(NamedTuple):
    """The batch and the lengths of x, y, z and z_box in one row of unknowns."""

    batch: tuple[int, ...]
    n: int
    p: int
    m: int
    boxed: bool

    def split(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor, MaybeTensor]:
        """x, y, z and z_box of rows ``(..., n + p + m + n)``."""
        x, y, z, *z_box = point.split([self.n, self.p, self.m, *([self.n] if self.boxed else [])], -1)
        return x, y, z, z_box[0] if self.boxed else None

    def start(self, previous: QPSolution | None, q: Tensor) -> Tensor:
        """The rows to start from: a previous solution, or zeros."""
        length = self.n + self.p + self.m + (self.n if self.boxed else 0)
        if previous is None:
            return torch.zeros(*self.batch, length, dtype=torch.float64, device=q.device)
        parts = [part for part in previous[:4] if part is not None]
        if previous.x.shape[:-1] not in (self.batch, ()):
            raise ShapeError(f"warm_start belongs to a batch of shape {tuple(previous.x.shape[:-1])}, the problem's is {self.batch}")
        row = torch.cat([part.expand(*self.batch, part.shape[-1]) for part in parts], -1)
        if row.shape[-1] != length:
            raise ShapeError(f"warm_start belongs to a problem of other sizes: {row.shape[-1]} unknowns and multipliers, expected {length}")
        return row.detach().to(torch.float64)


class Options(NamedTuple):
    """How the engines are called; ``rounding`` is the relative error of P's entries, ``warm`` says that the start is a solution."""

    solver: str
    tol: float
    max_iter: int
    on_failure: OnFailure
    rounding: float
    warm: bool
    smoothing: float = 0.0


class KKTProblem(BroadcastingProblem):
    """The KKT conditions as a root problem whose batches broadcast by themselves, solved and factorized by the dense engine."""

    core_ndims = CORE_NDIMS

    def __init__(self, sizes: Sizes, options: Options) -> None:
        residual = functools.partial(_residual, sizes)
        super().__init__(len(sizes.batch), residual=residual, on_failure=options.on_failure)
        self.sizes, self.options = sizes, options
        self._flat: DenseQP | None = None
        # Whether every active set was seen to be regular, and then the factors of parts of the batch.
        self._regular = False
        self._parts: list[tuple[slice, ReducedFactor | TinyFactor]] | None = None

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """Solve every element, report the failures, and keep the factor of the active set."""
        if 0 in self.sizes.batch:
            status = torch.zeros(self.sizes.batch, dtype=torch.int64, device=x0.device)
            return (x0.clone(), status, *x0.new_zeros(3, *self.sizes.batch), status.clone())
        self._flat = problem = flat_problem(theta, self.sizes)
        found = self._search(problem, x0.reshape(-1, x0.shape[-1]) if self.options.warm else None)
        parts = [found.x, found.y, found.z]
        if self.sizes.boxed:
            parts.append(found.z_upper - found.z_lower)
        batch = self.sizes.batch
        point = torch.cat(parts, -1)
        measured = [
            part.reshape(batch) for part in (found.status, found.primal_residual, found.dual_residual, found.duality_gap, found.iterations)
        ]
        if self._regular:
            report_failures(QPSolution(*self.sizes.split(point), *measured), "solve_qp", self.on_failure)
            return (point.reshape(*batch, -1), *measured)
        if self.sizes.boxed:
            # A variable at its bound is at its bound, and not a rounding error beside it.
            x, (lower, upper) = point[:, : self.sizes.n], active_sides(parts[3], problem.lb, problem.ub)
            x.copy_(torch.where(lower, problem.lb, torch.where(upper, problem.ub, x)))
        point = point.reshape(*batch, -1)
        report_failures(QPSolution(*self.sizes.split(point), *measured), "solve_qp", self.on_failure)
        self._factor = None if found.factor is None else self._active_set_factor(point, problem, found.factor)
        return (torch.nan_to_num(point, nan=0.0, posinf=0.0, neginf=0.0), *measured)

    def _search(self, problem: DenseQP, start: Tensor | None) -> DenseResult:
        """Solve with the engine that is wanted; what a compiled solver does not certify is left to the interior point engine."""
        if not self._is_native(problem):
            return self._robust(problem, None if start is None else self._kkt_point(start))
        (batch, n), rows = problem.q.shape, problem.G.shape[1] + problem.A.shape[1]
        worth = start is not None and min(batch, 32) * n * (n + rows) >= _RESUMED
        native = self._resume(problem, start) if worth else solve_native(problem)
        self._regular = bool(native.solved.all())
        found = DenseResult(*native.point, torch.zeros_like(native.iterations), *native[3:], factor=None)
        if self._regular:
            return found
        self._parts = None
        # An active set that is nearly right is worth a start; a degenerate one is a choice that is not left to the compiled solver.
        for left, origin in ((native.near, native.point), (~native.near & ~native.solved, None)):
            index = left.nonzero().squeeze(-1)
            if index.numel():
                begin = None if origin is None else KKTPoint(*each(lambda t, index=index: t[index], origin))
                _insert(found[:-1], index, self._robust(problem.take(index), begin)[:-1])
        return found

    def _robust(self, problem: DenseQP, start: KKTPoint | None) -> DenseResult:
        found = solve_dense(problem, tol=self.options.tol, max_iter=self.options.max_iter, start=start)
        # A stationary point of a problem that is not convex satisfies the same conditions, and may be a maximum.
        convex = _is_convex(problem.P, self.options.rounding)
        return found._replace(status=torch.where(convex, found.status, int(Status.NUMERICAL_ERROR)))

    def _resume(self, problem: DenseQP, start: Tensor) -> NativeResult:
        """Solve the active set of a solution of a problem nearby, and whatever it does not fit from the beginning."""
        self._parts = self._regular_factors(start, problem)
        _, _, z, z_box = self.sizes.split(start)
        limits = [-problem.q, problem.b, torch.where(z > 0, problem.h, 0.0)]
        if z_box is not None:
            lower, upper = active_sides(z_box, problem.lb, problem.ub)
            limits.append(torch.where(upper, problem.ub, torch.where(lower, problem.lb, 0.0)))
        rhs = torch.cat(limits, -1)
        point = torch.cat([factor.solve(rhs[part])[0] for part, factor in self._parts])
        found = certify(problem, *self.sizes.split(point))
        left = (~found.solved).nonzero().squeeze(-1)
        if left.numel():
            again = solve_native(problem.take(left))
            _insert((*found.point, *found[1:]), left, (*again.point, *again[1:]))
        return found

    def _is_native(self, problem: DenseQP) -> bool:
        if self.options.solver == "auto":
            small = problem.q.shape[1] <= _NATIVE_BELOW
            return small and problem.q.device.type == "cpu" and is_available()
        return self.options.solver == "daqp"

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        """Solve with the KKT matrix of the active set, or its transpose, reusing the engine's factor."""
        w, *theta = point
        if rhs.numel() == 0:
            status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
            return Solution(torch.zeros_like(rhs), status, rhs.new_zeros(rhs.shape[:-1]), status)
        flat = rhs.reshape(*rhs.shape[: int(columns)], -1, rhs.shape[-1])
        point = w.reshape(-1, w.shape[-1])
        if self._regular and self._parts is None:
            self._parts = self._regular_factors(point, self._flattened(theta))
        if self._regular and self._parts is not None:
            pieces = [factor.solve(flat[..., part, :], transpose=transpose) for part, factor in self._parts]
            solved, residual = pieces[0] if len(pieces) == 1 else (torch.cat([piece[i] for piece in pieces], -2 + i) for i in (0, 1))
            self._regular = bool((residual <= _ACCURATE).all()) or not bool(torch.isfinite(flat).all())
        if not self._regular:
            if self._factor is None:
                self._factor = self._active_set_factor(w, self._flattened(theta), None)
            solved, residual = self._solve_by_normal_equations(flat, transpose)
        residual = residual.reshape(rhs.shape[:-1])
        status = (residual > SINGULAR_ABOVE) * int(Status.SINGULAR)
        return Solution(solved.reshape(rhs.shape), status, residual, torch.zeros_like(status))

    def _flattened(self, theta: Sequence[Any]) -> DenseQP:
        return flat_problem(theta, self.sizes) if self._flat is None else self._flat

    def _regular_factors(self, point: Tensor, problem: DenseQP) -> list[tuple[slice, ReducedFactor | TinyFactor]]:
        """Factors of parts of the batch that fit into the cache."""
        _, _, z, z_box = self.sizes.split(point)
        held = [z.new_ones(z.shape[0], self.sizes.p, dtype=torch.bool), z > 0]
        if z_box is not None:
            held.append(torch.stack(active_sides(z_box, problem.lb, problem.ub)).any(0))
        tiny = point.shape[-1] ** 2 * min(point.shape[0], 4) <= _TINY
        active, kind = torch.cat(held, -1), TinyFactor if tiny else ReducedFactor
        size = max(_CACHED // (self.sizes.n + 1) ** 2, 1)
        parts = [slice(first, first + size) for first in range(0, point.shape[0], size)]
        return [(part, kind(problem.take(part), active[part])) for part in parts]

    def _solve_by_normal_equations(self, flat: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        x, y, z, z_box = self.sizes.split(flat)
        lower = self._factor.active_lower
        # The engine keeps one multiplier for each side of the box, with rows lb − x and x − ub; here w = upper − lower.
        sides = (None, None) if z_box is None else (torch.where(lower, -z_box, 0), torch.where(lower, 0, z_box))
        solved, residual = self._factor.solve(KKTPoint(x, y, z, *sides), transpose=transpose)
        parts = [solved.x, solved.y, solved.z]
        if z_box is not None:
            parts.append(torch.where(lower, -solved.z_lower, solved.z_upper))
        return torch.cat(parts, -1), residual

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        """(∂F/∂θ)ᵀ u in closed form: F is bilinear in θ and the unknowns, so that no product with P, G or A is needed."""
        _, _, _, _, _, _, lb, ub = theta
        x, y, z, z_box = self.sizes.split(x)
        u_x, u_y, u_z, u_box = self.sizes.split(u)
        u_z = torch.where(z > 0, u_z, 0)
        lower, upper = (z > 0, z > 0) if z_box is None else active_sides(z_box, lb, ub)
        closed = (
            lambda: _two_outer(u_x / 2, x, x / 2, u_x, theta[0]),
            lambda: u_x,
            lambda: _two_outer(u_z, x, z, u_x, theta[2]),
            lambda: -u_z,
            lambda: _two_outer(u_y, x, y, u_x, theta[4]),
            lambda: -u_y,
            lambda: torch.where(lower, -u_box, 0),
            lambda: torch.where(upper, -u_box, 0),
        )
        return [closed[i]().sum_to_size(theta[i].shape) for i in which]

    def deeper(self, size: int) -> KKTProblem:
        """The same problem with one more leading dimension."""
        return type(self)(self.sizes._replace(batch=(size, *self.sizes.batch)), self.options)

    def _active_set_factor(self, point: Tensor, problem: DenseQP, known: ActiveSetFactor | None) -> ActiveSetFactor:
        """The factor of the Jacobian of F at ``point``: the known one if it has the active set that F reads off the multipliers."""
        _, _, z, z_box = self.sizes.split(point.reshape(-1, point.shape[-1]))
        sides: tuple[MaybeTensor, MaybeTensor] = (None, None) if z_box is None else active_sides(z_box, problem.lb, problem.ub)
        if (
            known is not None
            and torch.equal(known.active, z > 0)
            and (z_box is None or (torch.equal(known.active_lower, sides[0]) and torch.equal(known.active_upper, sides[1])))
        ):
            return known
        return ActiveSetFactor(problem, z > 0, *sides)

    def _kkt_point(self, row: Tensor) -> KKTPoint:
        x, y, z, z_box = self.sizes.split(row)
        return KKTPoint(x, y, z, None, None) if z_box is None else KKTPoint(x, y, z, (-z_box).clamp(min=0), z_box.clamp(min=0))


def stationarity(sizes: Sizes, w: Tensor, theta: Sequence[Any]) -> Tensor:
    """The gradient of the Lagrangian, ``(*batch, n)``."""
    P, q, G, _, A, *_ = theta
    x, y, z, z_box = sizes.split(w)
    gradient = q if P is None else (times(P, x) + times(P.mT, x)) / 2 + q
    gradient = gradient if A is None else gradient + times(A.mT, y)
    gradient = gradient if G is None else gradient + times(G.mT, z)
    return (gradient if z_box is None else gradient + z_box).expand_as(x)


def _residual(sizes: Sizes, w: Tensor, *theta: Any) -> Tensor:
    _, _, G, h, A, b, lb, ub = theta
    x, _, z, z_box = sizes.split(w)
    rows = [stationarity(sizes, w, theta)]
    if A is not None:
        rows.append(times(A, x) - b)
    if G is not None:
        rows.append(torch.where(z > 0, times(G, x) - h, z))
    if z_box is not None:
        lower, upper = active_sides(z_box, lb, ub)
        rows.append(torch.where(upper, x - ub, torch.where(lower, x - lb, z_box)))
    return torch.cat(rows, -1)


def _insert(targets: Sequence[MaybeTensor], index: Tensor, sources: Sequence[MaybeTensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target is not None:
            target[index] = source


def active_sides(z_box: Tensor, lb: Tensor, ub: Tensor) -> tuple[Tensor, Tensor]:
    """Which bounds are active; a fixed variable (lb = ub) always has one, whatever its multiplier."""
    return z_box < 0, (z_box > 0) | ((z_box == 0) & (lb == ub))


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """The products of matrices ``(*batch, k, n)`` and vectors ``(*batch, n)``."""
    # One matrix for the whole batch is one product, and its gradient too.
    return vector @ matrix.mT if matrix.dim() == 2 else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _is_convex(P: Tensor, rounding: float) -> Tensor:
    """Whether P has no negative eigenvalue beyond the rounding of its entries, for each element (or the one that all share)."""
    size = P.abs().flatten(1).amax(-1) if P.shape[-1] else P.new_zeros(P.shape[0])
    shift = torch.where(size > 0, rounding * size, 1.0)
    shifted = P + shift[:, None, None] * torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    # LAPACK stops at a NaN; what is not finite is reported by the engine.
    finite = torch.isfinite(P).flatten(1).all(-1)
    return (torch.linalg.cholesky_ex(torch.where(finite[:, None, None], shifted, 0)).info == 0) | ~finite


def _two_outer(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor, like: Tensor) -> Tensor:
    """``left rightᵀ + other_left other_rightᵀ`` by one product, summed over the batch if ``like`` is one matrix for all of it."""
    axis = -1 if like.dim() > 2 else -2
    pairs = (torch.stack((left, other_left), axis), torch.stack((right, other_right), axis))
    if like.dim() > 2:
        return pairs[0] @ pairs[1].mT
    count = math.prod(pairs[0].shape[:-1])
    return pairs[0].reshape(count, left.shape[-1]).mT @ pairs[1].reshape(count, right.shape[-1])


def flat_problem(theta: Sequence[Any], sizes: Sizes) -> DenseQP:
    """The arguments with one batch dimension; matrices that the whole batch shares keep it at 1."""
    P, q, G, h, A, b, lb, ub = theta
    new = functools.partial(torch.zeros, dtype=torch.float64, device=q.device)
    count = math.prod(sizes.batch)

    def matrix(value: Tensor | None, rows: int) -> Tensor:
        if value is None:
            return new(1, rows, sizes.n)
        if all(size == 1 for size in value.shape[:-2]):
            return value.reshape(1, rows, sizes.n)
        return value.expand(*sizes.batch, rows, sizes.n).reshape(count, rows, sizes.n)

    def vector(value: Tensor | None, length: int) -> Tensor:
        value = new(length) if value is None else value
        return value.expand(*sizes.batch, length).reshape(count, length)

    quadratic = matrix(P, sizes.n)
    if not torch.equal(quadratic, quadratic.mT):
        quadratic = (quadratic + quadratic.mT) / 2
    box = (vector(lb, sizes.n), vector(ub, sizes.n)) if sizes.boxed else (None, None)
    return DenseQP(quadratic, vector(q, sizes.n), matrix(G, sizes.m), vector(h, sizes.m), matrix(A, sizes.p), vector(b, sizes.p), *box)
