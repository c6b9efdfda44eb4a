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
from ..implicit.function import Problem
from ..implicit.methods import LinearMethod
from ..solution import OnFailure, Solution, Status, report_failures
from .active_set import ActiveSetFactor
from .interior_point import solve_dense
from .normal_equations import DenseQP, KKTPoint, MaybeTensor

__all__ = ["CORE_NDIMS", "KKTProblem", "Options", "QPSolution", "Sizes"]

# Dimensions of P, q, G, h, A, b, lb, ub without the batch.
CORE_NDIMS = (2, 1, 2, 1, 2, 1, 1, 1)

# A linearized system that the active-set factor leaves with a larger relative residual has no solution there.
_SINGULAR_ABOVE = 1e-7


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
        sizes = (self.n, self.p, self.m, self.n if self.boxed else 0)
        x, y, z, z_box = (point.narrow(-1, sum(sizes[:i]), size) for i, size in enumerate(sizes))
        return x, y, z, z_box if self.boxed else None

    def start(self, previous: QPSolution | None, q: Tensor) -> Tensor:
        """The rows to start from: a previous solution, or zeros."""
        length = self.n + self.p + self.m + (self.n if self.boxed else 0)
        if previous is None:
            return torch.zeros(*self.batch, length, dtype=torch.float64, device=q.device)
        parts = [part for part in previous[:4] if part is not None]
        row = torch.cat([part.expand(*self.batch, part.shape[-1]) for part in parts], -1)
        if row.shape[-1] != length:
            raise ShapeError(f"warm_start belongs to a problem of other sizes: {row.shape[-1]} unknowns and multipliers, expected {length}")
        return row.detach().to(torch.float64)


class Options(NamedTuple):
    """How the engine is called; ``rounding`` is the relative error of P's entries, ``warm`` says that the start is a solution."""

    tol: float
    max_iter: int
    on_failure: OnFailure
    rounding: float
    warm: bool


class KKTProblem(Problem):
    """The KKT conditions as a root problem whose batches broadcast by themselves, solved and factorized by the dense engine."""

    def __init__(self, sizes: Sizes, options: Options) -> None:
        residual = functools.partial(_residual, sizes)
        super().__init__(residual, _searched_by_engine, LinearMethod(), batch_ndim=len(sizes.batch), on_failure=options.on_failure)
        self.sizes, self.options = sizes, options

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """Solve every element, report the failures, and keep the factor of the active set."""
        if 0 in self.sizes.batch:
            status = torch.zeros(self.sizes.batch, dtype=torch.int64, device=x0.device)
            return (x0.clone(), status, *x0.new_zeros(3, *self.sizes.batch), status.clone())
        problem = _flat_problem(theta, self.sizes)
        start = self._kkt_point(x0.reshape(-1, x0.shape[-1])) if self.options.warm else None
        found = solve_dense(problem, tol=self.options.tol, max_iter=self.options.max_iter, start=start)
        # A stationary point of a problem that is not convex satisfies the same conditions, and may be a maximum.
        found = found._replace(status=torch.where(_is_convex(problem.P, self.options.rounding), found.status, int(Status.NUMERICAL_ERROR)))
        x, sides = found.x, []
        if self.sizes.boxed:
            z_box = found.z_upper - found.z_lower
            lower, upper = _active_sides(z_box, problem.lb, problem.ub)
            # A variable at its bound is at its bound, and not a rounding error beside it.
            x, sides = torch.where(lower, problem.lb, torch.where(upper, problem.ub, x)), [z_box]
        parts = [x, found.y, found.z, *sides]
        batch = self.sizes.batch
        point = torch.cat(parts, -1).reshape(*batch, -1)
        measured = [
            part.reshape(batch) for part in (found.status, found.primal_residual, found.dual_residual, found.duality_gap, found.iterations)
        ]
        report_failures(QPSolution(*self.sizes.split(point), *measured), "solve_qp", self.on_failure)
        self._factor = self._active_set_factor(point, problem, found.factor)
        return (torch.nan_to_num(point, nan=0.0, posinf=0.0, neginf=0.0), *measured)

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        """Solve with the KKT matrix of the active set, or its transpose, reusing the engine's factor."""
        w, *theta = point
        if rhs.numel() == 0:
            status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
            return Solution(torch.zeros_like(rhs), status, rhs.new_zeros(rhs.shape[:-1]), status)
        if self._factor is None:
            self._factor = self._active_set_factor(w, _flat_problem(theta, self.sizes), None)
        flat = rhs.reshape(*rhs.shape[: int(columns)], -1, rhs.shape[-1])
        x, y, z, z_box = self.sizes.split(flat)
        lower = self._factor.active_lower
        # The engine keeps one multiplier for each side of the box, with rows lb − x and x − ub; here w = upper − lower.
        sides = (None, None) if z_box is None else (torch.where(lower, -z_box, 0), torch.where(lower, 0, z_box))
        solved, residual = self._factor.solve(KKTPoint(x, y, z, *sides), transpose=transpose)
        parts = [solved.x, solved.y, solved.z]
        if z_box is not None:
            parts.append(torch.where(lower, -solved.z_lower, solved.z_upper))
        residual = residual.reshape(rhs.shape[:-1])
        status = torch.where(residual <= _SINGULAR_ABOVE, int(Status.SOLVED), int(Status.SINGULAR))
        return Solution(torch.cat(parts, -1).reshape(rhs.shape), status, residual, torch.zeros_like(status))

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> list[Tensor]:
        """(∂F/∂θ)ᵀ u in closed form: F is bilinear in θ and the unknowns, so that no product with P, G or A is needed."""
        _, _, _, _, _, _, lb, ub = theta
        x, y, z, z_box = self.sizes.split(x)
        u_x, u_y, u_z, u_box = self.sizes.split(u)
        u_z = torch.where(z > 0, u_z, 0)
        lower, upper = (z > 0, z > 0) if z_box is None else _active_sides(z_box, lb, ub)
        closed = (
            lambda: (_outer(u_x, x, theta[0]) + _outer(x, u_x, theta[0])) / 2,
            lambda: u_x,
            lambda: _outer(u_z, x, theta[2]) + _outer(z, u_x, theta[2]),
            lambda: -u_z,
            lambda: _outer(u_y, x, theta[4]) + _outer(y, u_x, theta[4]),
            lambda: -u_y,
            lambda: torch.where(lower, -u_box, 0),
            lambda: torch.where(upper, -u_box, 0),
        )
        return [closed[i]().sum_to_size(theta[i].shape) for i in which]

    def batched(self, in_dims: tuple[int | None, ...], size: int, randomness: str) -> Problem:
        """The same problem with one more leading dimension: every argument broadcasts by itself."""
        key = (in_dims, size)
        if key not in self._batched:
            deeper = self.sizes._replace(batch=(size, *self.sizes.batch))
            self._batched[key] = KKTProblem(deeper, self.options)
        return self._batched[key]

    def align(self, theta: list[Any], in_dims: Sequence[int | None]) -> tuple[list[Any], tuple[int | None, ...]]:
        """The arguments with their new dimension in front and ones behind it, so that they broadcast against each other."""
        moved = []
        for leaf, dim, core in zip(theta, in_dims, CORE_NDIMS, strict=True):
            if dim is not None:
                missing = 1 + self.batch_ndim + core - leaf.dim()
                leaf = leaf.movedim(dim, 0)
                leaf = leaf.reshape(leaf.shape[0], *[1] * missing, *leaf.shape[1:])
            moved.append(leaf)
        return moved, tuple(None if dim is None else 0 for dim in in_dims)

    def _active_set_factor(self, point: Tensor, problem: DenseQP, known: ActiveSetFactor | None) -> ActiveSetFactor:
        """The factor of the Jacobian of F at ``point``: the known one if it has the active set that F reads off the multipliers."""
        _, _, z, z_box = self.sizes.split(point.reshape(-1, point.shape[-1]))
        sides: tuple[MaybeTensor, MaybeTensor] = (None, None) if z_box is None else _active_sides(z_box, problem.lb, problem.ub)
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


def _residual(sizes: Sizes, w: Tensor, *theta: Any) -> Tensor:
    P, q, G, h, A, b, lb, ub = theta
    x, y, z, z_box = sizes.split(w)
    gradient = q if P is None else (_times(P, x) + _times(P.mT, x)) / 2 + q
    rows = []
    if A is not None:
        gradient = gradient + _times(A.mT, y)
        rows.append(_times(A, x) - b)
    if G is not None:
        gradient = gradient + _times(G.mT, z)
        rows.append(torch.where(z > 0, _times(G, x) - h, z))
    if z_box is not None:
        gradient = gradient + z_box
        lower, upper = _active_sides(z_box, lb, ub)
        rows.append(torch.where(upper, x - ub, torch.where(lower, x - lb, z_box)))
    return torch.cat([gradient.expand_as(x), *rows], -1)


def _active_sides(z_box: Tensor, lb: Tensor, ub: Tensor) -> tuple[Tensor, Tensor]:
    """Which bounds are active; a fixed variable (lb = ub) always has one, whatever its multiplier."""
    return z_box < 0, (z_box > 0) | ((z_box == 0) & (lb == ub))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    # One matrix for the whole batch is one product, and its gradient too.
    return vector @ matrix.mT if matrix.dim() == 2 else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _is_convex(P: Tensor, rounding: float) -> Tensor:
    """Whether P has no negative eigenvalue beyond the rounding of its entries, for each element (or the one that all share)."""
    size = P.diagonal(dim1=-2, dim2=-1).abs().amax(-1) if P.shape[-1] else P.new_zeros(P.shape[0])
    shift = torch.where(size > 0, rounding * size, 1.0)
    shifted = P + shift[:, None, None] * torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    # LAPACK stops at a NaN; what is not finite is reported by the engine.
    finite = torch.isfinite(P).flatten(1).all(-1)
    return (torch.linalg.cholesky_ex(torch.where(finite[:, None, None], shifted, 0)).info == 0) | ~finite


def _outer(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """The outer product left rightᵀ, summed over the batch if ``like`` is one matrix for all of it."""
    if like.dim() == 2:
        return left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _flat_problem(theta: Sequence[Any], sizes: Sizes) -> DenseQP:
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


def _searched_by_engine(*_: Any) -> Any:
    raise RuntimeError("the dense engine solves quadratic programs, not a solver of roots")
