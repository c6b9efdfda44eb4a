r"""Quadratic programs as a layer: batched, dense, differentiable to any order.

.. math:: \min_x \tfrac12 x^T P x + q^T x \quad\text{subject to}\quad G x \le h,\; A x = b,\; l \le x \le u,

with P positive semidefinite (zero gives a linear program). With multipliers y of the equalities, z ≥ 0 of the inequalities and w of the
bounds (negative at a lower one, positive at an upper one), a point is optimal if and only if

.. math:: F(x, y, z, w) = \begin{pmatrix} P x + q + A^T y + G^T z + w \\ A x - b \\
          (G x - h)_i \text{ if } z_i > 0, \text{ else } z_i \\
          (x - u)_j \text{ if } w_j > 0,\; (x - l)_j \text{ if } w_j < 0, \text{ else } w_j \end{pmatrix} = 0

with z ≥ 0 and a feasible x. The forward pass (:mod:`~difflayers.convex.interior_point`) ends with an exact solve on the active set, so
that inactive multipliers are exactly zero. F is the residual that the core differentiates. Its Jacobian is the
KKT matrix of the active set, factorized once: backward, double backward and jvp reuse that factor.

The solution is differentiable where strict complementarity holds (no constraint is active with a zero multiplier). Elsewhere the
derivative is a choice: a weakly active constraint counts as inactive. Where multipliers are not unique
(redundant equalities, duplicate active rows) the derivative of x is right as long as the perturbation keeps the redundant rows
consistent, and the multipliers move by the least norm.

References: Amos and Kolter, OptNet, ICML 2017, arXiv:1703.00443; Fiacco, Introduction to Sensitivity and
Stability Analysis in Nonlinear Programming, Academic Press 1983.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction, Problem
from ..implicit.methods import LinearMethod
from ..solution import OnFailure, Solution, Status, report_failures
from .active_set import ActiveSetFactor, DenseQP, KKTPoint
from .interior_point import solve_dense

__all__ = ["QPLayer", "QPSolution", "solve_qp"]

# Dimensions of P, q, G, h, A, b, lb, ub without the batch.
_CORE_NDIMS = (2, 1, 2, 1, 2, 1, 1, 1)
_NAMES = ("P", "q", "G", "h", "A", "b", "lb", "ub")


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
        duality_gap: ``(*batch,)``, |xᵀPx + qᵀx + bᵀy + hᵀz + bound terms|.
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


@eager
def solve_qp(
    P: Tensor | None,
    q: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    lb: Tensor | None = None,
    ub: Tensor | None = None,
    *,
    solver: Literal["auto", "interior_point"] = "auto",
    tol: float | None = None,
    max_iter: int | None = None,
    warm_start: QPSolution | None = None,
    on_failure: OnFailure = "raise",
) -> QPSolution:
    """Solve min ½ xᵀPx + qᵀx subject to Gx ≤ h, Ax = b, lb ≤ x ≤ ub, for each element of the batch on its own.

    Leading batch dimensions broadcast. An argument without them is shared by the batch; its gradient is the sum.
    Everything is computed in float64; float32 arguments give float32 results.

    Args:
        P: ``(*batch, n, n)``, positive semidefinite; read as its symmetric part, its gradient is symmetric. None is zero (a linear program).
        q: ``(*batch, n)``.
        G: ``(*batch, m, n)``, or None.
        h: ``(*batch, m)``; +inf switches a row off.
        A: ``(*batch, p, n)``, or None.
        b: ``(*batch, p)``.
        lb: ``(*batch, n)``, or None; −inf is no bound.
        ub: ``(*batch, n)``, or None; +inf is no bound.
        solver: "interior_point"; "auto" chooses it.
        tol: largest KKT residual of a solved element, relative to 1 + the size of its terms. None: 1e-9 (float64), 1e-6 (float32).
        max_iter: interior-point iterations; None: 100.
        warm_start: the solution of a similar problem; an unchanged active set then costs one factorization.
        on_failure: ``"raise"``, ``"nan"`` (failed elements are NaN and have zero gradient) or ``"warn"`` (best iterate).

    Returns:
        :class:`QPSolution`.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        InfeasibleError, UnboundedError, NotConvergedError: some elements have no solution (``on_failure="raise"``).

    Example:
        >>> import torch
        >>> from difflayers.convex import solve_qp
        >>> q = torch.tensor([-1.0, -3.0], requires_grad=True)
        >>> found = solve_qp(torch.eye(2), q, lb=torch.zeros(2), ub=torch.full((2,), 2.0))
        >>> found.x
        tensor([1., 2.], grad_fn=<ToCopyBackward0>)
        >>> torch.autograd.grad(found.x.sum(), q)
        (tensor([-1., -0.]),)
    """
    arguments = (P, q, G, h, A, b, lb, ub)
    if solver not in ("auto", "interior_point"):
        raise ValueError(f"solver={solver!r} is not known; choose 'auto' or 'interior_point'")
    sizes = _validate(arguments)
    dtype = q.dtype
    problem = _QPProblem(sizes, _default_tol(tol, dtype), max_iter or 100, on_failure, warm=warm_start is not None)
    theta: list[Tensor | None] = [None if part is None else part.to(torch.float64) for part in arguments]
    if sizes.boxed:
        theta[6] = torch.full_like(theta[7], -torch.inf) if theta[6] is None else theta[6]
        theta[7] = torch.full_like(theta[6], torch.inf) if theta[7] is None else theta[7]
    start = sizes.start(warm_start, q)
    start, *theta = visible_to_modes([start, *theta])
    point, status, primal, dual, gap, iterations = ImplicitFunction.apply(problem, start.detach(), *theta)
    if on_failure != "raise":
        lost = status != Status.SOLVED if on_failure == "nan" else status == Status.NUMERICAL_ERROR
        point = torch.where(lost.unsqueeze(-1), torch.nan, point)
    x, y, z, z_box = sizes.split(point.to(dtype))
    return QPSolution(x, y, z, z_box, status, primal.to(dtype), dual.to(dtype), gap.to(dtype), iterations)


class QPLayer(nn.Module):
    """:func:`solve_qp` as a module: ``forward`` returns the minimizer, ``solve`` the whole :class:`QPSolution`.

    Args:
        solver: as in :func:`solve_qp`.
        tol: as in :func:`solve_qp`.
        max_iter: as in :func:`solve_qp`.
        on_failure: as in :func:`solve_qp`.

    Example:
        >>> import torch
        >>> from difflayers import QPLayer
        >>> layer = QPLayer()
        >>> q = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
        >>> layer(torch.eye(2), q, A=torch.ones(1, 2), b=torch.ones(1), lb=torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(
        self,
        *,
        solver: Literal["auto", "interior_point"] = "auto",
        tol: float | None = None,
        max_iter: int | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        self.solver: Literal["auto", "interior_point"] = solver
        self.tol, self.max_iter = tol, max_iter
        self.on_failure: OnFailure = on_failure

    def forward(
        self,
        P: Tensor | None,
        q: Tensor,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        lb: Tensor | None = None,
        ub: Tensor | None = None,
    ) -> Tensor:
        """The minimizer ``(*batch, n)``.

        Args:
            P: ``(*batch, n, n)`` or None.
            q: ``(*batch, n)``.
            G: ``(*batch, m, n)`` or None.
            h: ``(*batch, m)`` or None.
            A: ``(*batch, p, n)`` or None.
            b: ``(*batch, p)`` or None.
            lb: ``(*batch, n)`` or None.
            ub: ``(*batch, n)`` or None.
        """
        return self.solve(P, q, G, h, A, b, lb, ub).x

    def solve(self, P: Tensor | None, q: Tensor, *constraints: Tensor | None, warm_start: QPSolution | None = None, **named: Tensor | None) -> QPSolution:
        """As ``forward``, with multipliers, status and residuals.

        Args:
            P: ``(*batch, n, n)`` or None.
            q: ``(*batch, n)``.
            constraints: G, h, A, b, lb, ub, as in :func:`solve_qp`.
            warm_start: the solution of a similar problem.
            named: the same by name.
        """
        options = {"solver": self.solver, "tol": self.tol, "max_iter": self.max_iter, "on_failure": self.on_failure}
        return solve_qp(P, q, *constraints, warm_start=warm_start, **named, **options)

    def extra_repr(self) -> str:
        """The options that differ from their defaults, and ``on_failure``."""
        shown = [f"on_failure={self.on_failure!r}"]
        shown += [f"{name}={value!r}" for name, value in (("solver", self.solver), ("tol", self.tol), ("max_iter", self.max_iter)) if value not in (None, "auto")]
        return ", ".join(shown)


class _Sizes(NamedTuple):
    """The batch and the lengths of x, y, z and z_box in one row of unknowns."""

    batch: tuple[int, ...]
    n: int
    p: int
    m: int
    boxed: bool

    def split(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x, y, z, z_box = point.split([self.n, self.p, self.m, self.n if self.boxed else 0], -1)
        return x, y, z, z_box if self.boxed else None

    def start(self, previous: QPSolution | None, q: Tensor) -> Tensor:
        length = self.n + self.p + self.m + (self.n if self.boxed else 0)
        if previous is None:
            return torch.zeros(*self.batch, length, dtype=torch.float64, device=q.device)
        parts = [part for part in previous[:4] if part is not None]
        row = torch.cat([part.expand(*self.batch, part.shape[-1]) for part in parts], -1)
        if row.shape[-1] != length:
            raise ShapeError(f"warm_start belongs to a problem of other sizes: {row.shape[-1]} unknowns and multipliers, expected {length}")
        return row.detach().to(torch.float64)


class _QPProblem(Problem):
    """The KKT conditions as a root problem whose batches broadcast by themselves, solved and factorized by the dense engine."""

    def __init__(self, sizes: _Sizes, tol: float, max_iter: int, on_failure: OnFailure, *, warm: bool) -> None:
        super().__init__(functools.partial(_kkt_residual, sizes), _searched_by_engine, LinearMethod(), batch_ndim=len(sizes.batch), on_failure=on_failure)
        self.sizes, self.tol, self.max_iter, self.warm = sizes, tol, max_iter, warm

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        problem = _flat_problem(theta, self.sizes)
        start = self._kkt_point(x0.reshape(-1, x0.shape[-1])) if self.warm else None
        found = solve_dense(problem, tol=self.tol, max_iter=self.max_iter, start=start)
        parts = [found.x, found.y, found.z]
        if self.sizes.boxed:
            parts.append(found.z_upper - found.z_lower)
        batch = self.sizes.batch
        point = torch.cat(parts, -1).reshape(*batch, -1)
        measured = [part.reshape(batch) for part in (found.status, found.primal_residual, found.dual_residual, found.duality_gap, found.iterations)]
        report_failures(QPSolution(*self.sizes.split(point), *measured), "solve_qp", self.on_failure)
        factor = self._active_set_factor(point, theta, found.factor)
        self._factor = factor
        return (torch.nan_to_num(point, nan=0.0, posinf=0.0, neginf=0.0), *measured)

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        w, *theta = point
        if self._factor is None:
            self._factor = self._active_set_factor(w, theta, None)
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
        lower, upper = (None, None) if z_box is None else _active_sides(z_box, lb, ub)
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
        key = (in_dims, size)
        if key not in self._batched:
            deeper = self.sizes._replace(batch=(size, *self.sizes.batch))
            self._batched[key] = _QPProblem(deeper, self.tol, self.max_iter, self.on_failure, warm=self.warm)
        return self._batched[key]

    def align(self, theta: list[Any], in_dims: Sequence[int | None]) -> tuple[list[Any], tuple[int | None, ...]]:
        moved = []
        for leaf, dim, core in zip(theta, in_dims, _CORE_NDIMS, strict=True):
            if dim is not None:
                # Ones between the new dimension and the old ones let every argument broadcast against the others.
                missing = 1 + self.batch_ndim + core - leaf.dim()
                leaf = leaf.movedim(dim, 0)
                leaf = leaf.reshape(leaf.shape[0], *[1] * missing, *leaf.shape[1:])
            moved.append(leaf)
        return moved, tuple(None if dim is None else 0 for dim in in_dims)

    def _active_set_factor(self, point: Tensor, theta: Sequence[Any], known: ActiveSetFactor | None) -> ActiveSetFactor:
        """The factor of the Jacobian of F at ``point``: the known one if it has the active set that F reads off the multipliers."""
        _, _, z, z_box = self.sizes.split(point.reshape(-1, point.shape[-1]))
        problem = _flat_problem(theta, self.sizes)
        sides = (None, None) if z_box is None else _active_sides(z_box, problem.lb, problem.ub)
        if known is not None and torch.equal(known.active, z > 0) and (z_box is None or all(map(torch.equal, (known.active_lower, known.active_upper), sides))):
            return known
        return ActiveSetFactor(problem, z > 0, *sides)

    def _kkt_point(self, row: Tensor) -> KKTPoint:
        x, y, z, z_box = self.sizes.split(row)
        return KKTPoint(x, y, z, None, None) if z_box is None else KKTPoint(x, y, z, (-z_box).clamp(min=0), z_box.clamp(min=0))


# A linearized system that the active-set factor leaves with a larger relative residual has no solution there.
_SINGULAR_ABOVE = 1e-7


def _kkt_residual(sizes: _Sizes, w: Tensor, *theta: Any) -> Tensor:
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


def _outer(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """left rightᵀ, summed over the batch if ``like`` is one matrix for all of it."""
    if like.dim() == 2:
        return left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _flat_problem(theta: Sequence[Any], sizes: _Sizes) -> DenseQP:
    """The arguments with one batch dimension; matrices that the whole batch shares keep it at 1."""
    P, q, G, h, A, b, lb, ub = theta
    new = functools.partial(torch.zeros, dtype=torch.float64, device=q.device)

    def matrix(value: Tensor | None, rows: int) -> Tensor:
        if value is None:
            return new(1, rows, sizes.n)
        if all(size == 1 for size in value.shape[:-2]):
            return value.reshape(1, rows, sizes.n)
        return value.expand(*sizes.batch, rows, sizes.n).reshape(-1, rows, sizes.n)

    def vector(value: Tensor | None, length: int) -> Tensor:
        value = new(length) if value is None else value
        return value.expand(*sizes.batch, length).reshape(-1, length)

    quadratic = matrix(P, sizes.n)
    if not torch.equal(quadratic, quadratic.mT):
        quadratic = (quadratic + quadratic.mT) / 2
    box = (vector(lb, sizes.n), vector(ub, sizes.n)) if sizes.boxed else (None, None)
    return DenseQP(quadratic, vector(q, sizes.n), matrix(G, sizes.m), vector(h, sizes.m), matrix(A, sizes.p), vector(b, sizes.p), *box)


def _validate(arguments: Sequence[Tensor | None]) -> _Sizes:
    given = dict(zip(_NAMES, arguments, strict=True))
    q = given["q"]
    for name, value in given.items():
        if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"{name} must be a floating tensor or None, got {came}")
    if q is None or q.dim() < 1:
        raise ShapeError("q must be a tensor of shape (*batch, n); use zeros for a problem without a linear term")
    for first, second in (("G", "h"), ("A", "b")):
        if (given[first] is None) != (given[second] is None):
            raise ShapeError(f"{first} and {second} come together; got only {first if given[second] is None else second}")
    n = q.shape[-1]
    m = 0 if given["h"] is None else given["h"].shape[-1]
    p = 0 if given["b"] is None else given["b"].shape[-1]
    wanted = {"P": (n, n), "q": (n,), "G": (m, n), "h": (m,), "A": (p, n), "b": (p,), "lb": (n,), "ub": (n,)}
    for name, core in zip(_NAMES, _CORE_NDIMS, strict=True):
        value = given[name]
        if value is None:
            continue
        if value.dim() < core or tuple(value.shape[value.dim() - core :]) != wanted[name]:
            raise ShapeError(f"{name} must have the shape (*batch, {', '.join(map(str, wanted[name]))}), got {tuple(value.shape)} (n={n} is the length of q)")
        if value.dtype != q.dtype or value.device != q.device:
            raise ShapeError(f"{name} is {value.dtype} on {value.device}, q is {q.dtype} on {q.device}; convert one of them")
    leads = {name: tuple(value.shape[: value.dim() - core]) for (name, value), core in zip(given.items(), _CORE_NDIMS, strict=True) if value is not None}
    try:
        batch = torch.broadcast_shapes(*leads.values())
    except RuntimeError as error:
        raise ShapeError("batch dimensions do not broadcast: " + ", ".join(f"{name} {lead}" for name, lead in leads.items())) from error
    return _Sizes(tuple(batch), n, p, m, given["lb"] is not None or given["ub"] is not None)


def _default_tol(tol: float | None, dtype: torch.dtype) -> float:
    if tol is not None:
        return tol
    return 1e-9 if dtype == torch.float64 else 1e-6


def _searched_by_engine(*_: Any) -> Any:
    raise RuntimeError("the dense engine solves quadratic programs, not a solver of roots")
