r"""Conic programs as a layer: second-order, semidefinite, exponential and power cones, differentiable to any order.

.. math:: \min_x \tfrac12 x^T P x + q^T x \quad\text{subject to}\quad A x + s = b,\; s \in K

with P positive semidefinite and K a product of cones (:class:`Cones`). A compiled solver finds the solution, Newton's method on the
optimality conditions sharpens it, and a status is decided by their measured residual; the core differentiates them
(:mod:`~difflayers.convex.cone_program`).

The solution is differentiable where it is unique and strictly complementary. Elsewhere the derivative is a choice: a weakly active
inequality counts as inactive, and where the linear system behind a derivative is singular its solution of least norm is taken.
If it has none, the derivative does not exist, and that is reported.

Reference: Agrawal, Amos, Barratt, Boyd, Diamond and Kolter, Differentiable convex optimization layers, NeurIPS 2019, arXiv:1910.12430.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..implicit.closure import visible_to_modes
from ..implicit.eager import eager
from ..implicit.function import ImplicitFunction
from ..solution import OnFailure, Status
from .cone_geometry import Cones, project
from .cone_program import ConeOptions, ConeProblem, ConeSolution
from .cone_solvers import automatic_solver, known_solver
from .cone_structure import Pattern, Structure

__all__ = ["ConeSolution", "Cones", "solve_cone", "solve_rows"]

Matrix = Tensor | tuple[Tensor, Tensor]


@eager
def solve_cone(
    P: Matrix | None,
    q: Tensor,
    A: Matrix,
    b: Tensor,
    cones: Cones,
    *,
    solver: str = "auto",
    solver_args: dict[str, Any] | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    warm_start: ConeSolution | None = None,
    on_failure: OnFailure = "raise",
) -> ConeSolution:
    """Solve min ½ xᵀPx + qᵀx subject to Ax + s = b with s in a product of cones, for each element of the batch on its own.

    Leading batch dimensions broadcast. An argument without them is shared by the batch; its gradient is the sum.
    Everything is computed in float64; float32 arguments give float32 results.

    Args:
        P: ``(*batch, n, n)``, positive semidefinite, read as its symmetric part; or ``(indices, values)`` of shapes
            ``(2, nnz)`` and ``(*batch, nnz)``, a sparse matrix whose pattern the batch shares; None is zero.
        q: ``(*batch, n)``.
        A: ``(*batch, m, n)``, or ``(indices, values)``.
        b: ``(*batch, m)``.
        cones: which rows of the slack b − A x lie in which cone, in the order of :class:`Cones`.
        solver: "CLARABEL", "SCS", or "QP", the dense engine of :func:`~difflayers.convex.solve_qp` for linear constraints; "auto" takes
            that one where they are few or dense, and Clarabel elsewhere.
        solver_args: settings of the solver, by its own names.
        tol: largest residual of the optimality conditions of a solved element, relative to 1 + the size of their terms.
            None: 1e-8 (float64), 1e-6 (float32).
        max_iter: the solver's iterations; None: its own limit.
        warm_start: the solution of a similar problem, for a solver that can start from one ("SCS", "QP").
        on_failure: ``"raise"``, ``"nan"`` (failed elements are NaN and have zero gradient) or ``"warn"`` (best iterate).

    Returns:
        :class:`ConeSolution`.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        InfeasibleError, UnboundedError, NotConvergedError: some elements have no solution (``on_failure="raise"``).
        MissingExtraError: the solver is not installed.

    Example:
        The point of the unit disc that is farthest along c:

        >>> import torch
        >>> from difflayers.convex import Cones, solve_cone
        >>> c = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> A = torch.cat([torch.zeros(1, 2), -torch.eye(2)])
        >>> found = solve_cone(None, -c, A, torch.tensor([1.0, 0.0, 0.0]), Cones(soc=(3,)))
        >>> found.x.detach()
        tensor([0.6000, 0.8000])
        >>> torch.autograd.grad(found.x[0], c)[0]
        tensor([ 0.1280, -0.0960])
    """
    _check_cones(cones, b)
    n, m = q.shape[-1], b.shape[-1]
    P_pattern, P_values = (None, None) if P is None else _symmetric(*_pattern("P", P, (n, n)), dense=isinstance(P, Tensor))
    A_pattern, A_values = _pattern("A", A, (m, n))
    theta = (P_values, q, A_values, b)
    batch = _batch(theta)
    structure = Structure(batch, cones, P_pattern, A_pattern)
    double = q.dtype == torch.float64
    options = ConeOptions(
        tol=(1e-8 if double else 1e-6) if tol is None else tol,
        max_iter=max_iter,
        solver=automatic_solver(cones, P_pattern, A_pattern) if solver == "auto" else solver,
        solver_args=solver_args or {},
        on_failure=on_failure,
        warm=warm_start is not None,
    )
    start = None if warm_start is None else torch.cat([warm_start.x, warm_start.s - warm_start.y], -1)
    double = [None if part is None else part.to(torch.float64) for part in theta]
    x, v, status, primal, dual, gap, iterations = _solve(structure, double, options, None if start is None else start.to(torch.float64))
    s = project(cones, v)
    # The Function keeps its output for the derivatives; the caller's copy may be modified in place.
    x, y, s = (part.to(q.dtype, copy=True) for part in (x, s - v, s))
    return ConeSolution(x, y, s, status, primal.to(q.dtype), dual.to(q.dtype), gap.to(q.dtype), iterations)


def solve_rows(
    structure: Structure, theta: Sequence[Tensor | None], options: ConeOptions, *, start: Tensor | None = None, duals: bool = True
) -> list[Any]:
    """Solve programs in their inner form, patterns and float64 values ``(*batch, nnz)``; nothing is checked.

    Args:
        structure: what the batch shares.
        theta: the values of P (or None), q, the values of A, and b.
        options: how to solve.
        start: rows (x, s − y) to start from.
        duals: whether y is wanted.

    Returns:
        x, y (or None), status, residual, iterations, and the rows (x, s − y) for another start; x and y are differentiable.
    """
    x, v, status, primal, dual, _, iterations = _solve(structure, theta, options, start)
    y = project(structure.cones, v) - v if duals else None
    return [x, y, status, torch.maximum(primal, dual), iterations, torch.cat([x, v], -1).detach()]


def _solve(structure: Structure, theta: Sequence[Tensor | None], options: ConeOptions, start: Tensor | None) -> list[Tensor]:
    """x, v and the diagnostics."""
    known_solver(options.solver)
    q: Any = theta[1]
    length = structure.n + structure.m
    point = q.new_zeros(*structure.batch, length) if start is None else start.detach().expand(*structure.batch, length)
    point, *values = visible_to_modes([point, *theta])
    z, status, *measured = ImplicitFunction.apply(ConeProblem(structure, options), point.detach(), *values)
    if options.on_failure != "raise":
        lost = status != Status.SOLVED if options.on_failure == "nan" else status == Status.NUMERICAL_ERROR
        z = torch.where(lost.unsqueeze(-1), torch.nan, z)
    return [*structure.split(z), status, *measured]


def _check_cones(cones: Cones, b: Tensor) -> None:
    if any(alpha <= 0 or alpha >= 1 for alpha in cones.pow):
        raise ValueError(f"the exponent of a power cone lies between 0 and 1, got {cones.pow}")
    if b.dim() < 1 or cones.rows != b.shape[-1]:
        raise ShapeError(f"the cones have {cones.rows} rows, b has the shape {tuple(b.shape)}; {cones}")


def _pattern(name: str, matrix: Matrix, shape: tuple[int, int]) -> tuple[Pattern, Tensor]:
    if isinstance(matrix, Tensor):
        if matrix.dim() < 2 or tuple(matrix.shape[-2:]) != shape:
            raise ShapeError(f"{name} must have the shape (*batch, {shape[0]}, {shape[1]}), got {tuple(matrix.shape)}")
        # Made inside a transform, an index would belong to its level, and the problem outlives the level.
        with torch._C._DisableFuncTorch():
            rows = torch.arange(shape[0], device=matrix.device).repeat_interleave(shape[1])
            columns = torch.arange(shape[1], device=matrix.device).repeat(shape[0])
        return Pattern(rows, columns, shape), matrix.flatten(-2)
    indices, values = matrix
    if indices.dim() != 2 or indices.shape[0] != 2 or values.dim() < 1 or indices.shape[1] != values.shape[-1]:
        raise ShapeError(
            f"{name} as (indices, values) has shapes (2, nnz) and (*batch, nnz), got {tuple(indices.shape)} and {tuple(values.shape)}"
        )
    limits = torch.tensor(shape, device=indices.device).unsqueeze(-1)
    if bool(((indices < 0) | (indices >= limits)).any()):
        raise ShapeError(f"{name} has indices outside of its shape {shape}")
    while torch._C._functorch.is_gradtrackingtensor(indices):
        indices = torch._C._functorch.get_unwrapped(indices)
    with torch._C._DisableFuncTorch():
        return Pattern(indices[0], indices[1], shape), values


def _symmetric(pattern: Pattern, values: Tensor, *, dense: bool) -> tuple[Pattern, Tensor]:
    """The symmetric part: every entry once more, mirrored, each with half its value."""
    if dense:
        square = values.unflatten(-1, pattern.shape)
        return pattern, ((square + square.mT) / 2).flatten(-2)
    with torch._C._DisableFuncTorch():
        rows, columns = torch.cat([pattern.rows, pattern.columns]), torch.cat([pattern.columns, pattern.rows])
    return Pattern(rows, columns, pattern.shape), torch.cat([values, values], -1) / 2


def _batch(theta: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    names = ("P", "q", "A", "b")
    given = {name: part for name, part in zip(names, theta, strict=True) if part is not None}
    q = given["q"]
    for name, part in given.items():
        if not part.is_floating_point() or part.dtype != q.dtype or part.device != q.device:
            raise ShapeError(
                f"{name} is {part.dtype} on {part.device}, q is {q.dtype} on {q.device}; give all one floating dtype and device"
            )
    try:
        return tuple(torch.broadcast_shapes(*(part.shape[:-1] for part in given.values())))
    except RuntimeError as error:
        leads = ", ".join(f"{name} {tuple(part.shape[:-1])}" for name, part in given.items())
        raise ShapeError(f"batch dimensions do not broadcast: {leads}") from error
