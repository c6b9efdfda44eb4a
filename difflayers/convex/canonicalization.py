r"""From a CVXPY problem with parameters to conic programs whose data are affine in the parameters.

cvxpylayers finds the canonical form (``parse_args``): with p all the parameters in one row and a 1 behind them,

.. math:: (P, q, A, b) = M\,(p, 1),

one sparse matrix M for each, fixed once. The rows of A are those that Clarabel takes: zero, nonnegative, second-order, semidefinite
(upper triangle, scaled), exponential, power. In that form all the constraints are rows. Other solvers of CVXPY ≥ 1.9 are given some
of them beside the rows (``dir_cones``, ``lower_bounds``, ``upper_bounds``), and who does not look there drops them; what is found
there is refused. M is applied by differentiable operations, so the chain rule from the data to the parameters is PyTorch's.

Reference: Agrawal, Amos, Barratt, Boyd, Diamond and Kolter, Differentiable convex optimization layers, NeurIPS 2019, arXiv:1910.12430.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DiffLayersError, MissingExtraError
from .cone_geometry import Cones, triangle
from .cone_structure import Pattern

__all__ = ["AffineMap", "Canonical", "canonicalize", "canonicalizer", "cones_of", "split_rows", "square_pattern"]


class AffineMap(NamedTuple):
    """The map (p, 1) ↦ M (p, 1) as the entries of a sparse matrix, and its last column."""

    rows: Tensor
    columns: Tensor
    entries: Tensor
    constant: Tensor

    def __call__(self, parameters: Tensor) -> Tensor:
        """The data ``(..., rows)`` of parameters ``(..., columns)``."""
        if not len(self.rows):
            return self.constant
        moving = self.entries * parameters[..., self.columns]
        return self.constant.expand(*parameters.shape[:-1], -1).index_add(-1, self.rows, moving)

    def to(self, device: torch.device) -> AffineMap:
        """The same map on a device."""
        return AffineMap(*(part.to(device) for part in self))


class Recovery(NamedTuple):
    """Where a variable of the problem is: entries of x or y, times ``scale``, in the order of its own entries."""

    dual: bool
    where: Tensor
    scale: Tensor | None
    shape: tuple[int, ...]

    def __call__(self, x: Tensor, y: Tensor | None) -> Tensor:
        """The variable ``(..., *shape)``."""
        source: Any = y if self.dual else x
        values = source[..., self.where.to(source.device) if self.shape else int(self.where)]
        return values if self.scale is None else values * self.scale.to(values)


class Canonical(NamedTuple):
    """A problem in canonical form.

    Attributes:
        shapes: those of the parameters.
        cones: where the slack lies.
        P, A: the patterns; P is None where the objective is linear.
        maps: from the parameters to the values of P, q, the values of A, and b.
        order: the parameters in the order of their columns, each with the entries that it contributes (None: all, column by column).
        logarithms: for each parameter, whether its logarithm is meant (geometric programs).
        recoveries: one for each variable that is asked for.
    """

    shapes: tuple[tuple[int, ...], ...]
    cones: Cones
    P: Pattern | None
    A: Pattern
    maps: tuple[AffineMap | None, AffineMap, AffineMap, AffineMap]
    order: tuple[tuple[int, tuple[Tensor, Tensor] | None], ...]
    logarithms: tuple[bool, ...]
    recoveries: tuple[Recovery, ...]


def canonicalizer() -> Any:
    """cvxpylayers' class for solvers of one's own, as which its canonicalization is asked.

    Raises:
        MissingExtraError: cvxpy or cvxpylayers is not there.
    """
    try:
        from cvxpylayers.interfaces.base import SolverInterface
    except ImportError as error:
        raise MissingExtraError(
            "CvxpyLayer needs cvxpy (1.9 or later) and cvxpylayers (1.2 or later): pip install 'cvxpy>=1.9' 'cvxpylayers>=1.2'"
        ) from error
    return SolverInterface


def canonicalize(
    problem: Any,
    parameters: Sequence[Any],
    variables: Sequence[Any],
    *,
    gp: bool,
    verbose: bool,
    canon_backend: str | None,
    quadratic: bool,
) -> Canonical:
    """The canonical form of a parametrized CVXPY problem.

    Args:
        problem: a ``cvxpy.Problem`` that follows the rules of disciplined parametrized programming.
        parameters: all its parameters, in the order of the tensors to come.
        variables: some of its variables, or dual variables of its constraints.
        gp: whether it is a geometric program.
        verbose: let CVXPY say what it does.
        canon_backend: CVXPY's backend.
        quadratic: whether ``quad_form(x, P)`` with a parameter P may stand in the objective.

    Raises:
        ValueError: as cvxpylayers does: the problem is not DPP, or parameters or variables do not belong to it.
        DiffLayersError: a cone or an attribute that has no derivative here.
    """
    interface = canonicalizer()
    from cvxpylayers.utils.parse_args import parse_args

    class Canonicalizer(interface):
        canon_solver = "CLARABEL"
        supports_quad_obj = quadratic

        def solve_torch_batch(self, *_: Any) -> Any:
            raise NotImplementedError

        derivative_torch_batch = solve_torch_batch

    try:
        context = parse_args(
            problem,
            list(variables),
            list(parameters),
            None,
            gp=gp,
            verbose=verbose,
            canon_backend=canon_backend,
            solver_args={},
            custom_solver=Canonicalizer(),
        )
    except ValueError as error:
        if "must be DPP" in str(error) and not gp and not quadratic and _is_dpp_with_quadratic_forms(problem):
            raise ValueError(f"{error} quad_form(x, P) with a parameter P needs a solver by name, as solver='CLARABEL'") from None
        raise
    if not gp:
        _refuse_constraints_outside_of_rows(problem, verbose, canon_backend, quadratic)
    _refuse_reduced_variables(variables)
    # The tensors outlive any transform that is active around this call.
    with torch._C._DisableFuncTorch(), torch.inference_mode(False):
        return _canonical(context, problem, parameters, variables)


def _canonical(context: Any, problem: Any, parameters: Sequence[Any], variables: Sequence[Any]) -> Canonical:
    cones = cones_of(context.cone_dims)
    n, m = context.q.shape[0] - 1, cones.rows
    P, P_map = _square(context.reduced_P, n)
    A, A_map, b_map = _rows(context.reduced_A, n, m)
    q_map = _affine(context.q.tocsr()[:n])
    order = sorted(range(len(parameters)), key=lambda i: context.user_order_to_col_order[i])
    triangles = context.param_triu_indices or (None,) * len(parameters)
    entries = [None if pair is None else (torch.tensor(pair[0]), torch.tensor(pair[1])) for pair in triangles]
    duals = {dual.id: (constraint, k) for constraint in problem.constraints for k, dual in enumerate(constraint.dual_variables)}
    recoveries = tuple(_recovery(how, duals.get(variable.id)) for variable, how in zip(variables, context.var_recover, strict=True))
    logarithms = tuple(context.gp_log_mask or (False,) * len(parameters))
    shapes = tuple(tuple(parameter.shape) for parameter in parameters)
    return Canonical(shapes, cones, P, A, (P_map, q_map, A_map, b_map), tuple((i, entries[i]) for i in order), logarithms, recoveries)


def cones_of(dims: Any) -> Cones:
    """CVXPY's cone dimensions as :class:`Cones`."""
    if getattr(dims, "pnd", None):
        raise DiffLayersError("power cones of more than three dimensions have no derivative here; write them as three-dimensional ones")
    return Cones(
        int(dims.zero), int(dims.nonneg), tuple(map(int, dims.soc)), tuple(map(int, dims.psd)), int(dims.exp), tuple(map(float, dims.p3d))
    )


def _is_dpp_with_quadratic_forms(problem: Any) -> bool:
    from cvxpy.utilities import scopes

    with scopes.quad_form_dpp_scope():
        return problem.is_dpp()


def _refuse_constraints_outside_of_rows(problem: Any, verbose: bool, canon_backend: str | None, quadratic: bool) -> None:
    from cvxpy.utilities import scopes

    with scopes.quad_form_dpp_scope() if quadratic else contextlib.nullcontext():  # as before, so that CVXPY has it at hand
        data, _, _ = problem.get_problem_data(solver="CLARABEL", gp=False, verbose=verbose, canon_backend=canon_backend, solver_opts={})
    beside = [name for name in ("dir_cones", "lower_bounds", "upper_bounds") if data.get(name) is not None and len(data[name])]
    if beside:
        raise DiffLayersError(f"CVXPY keeps constraints in {', '.join(beside)}, which this version cannot read; please report it")


def _refuse_reduced_variables(variables: Sequence[Any]) -> None:
    for variable in variables:
        if variable.attributes.get("diag") or variable.attributes.get("sparsity"):
            raise NotImplementedError(
                f"{variable} is declared diagonal or sparse, which cannot be read back; declare its diagonal or entries"
            )


def _affine(matrix: Any) -> AffineMap:
    moving = matrix[:, :-1].tocoo()
    rows, columns = (torch.as_tensor(np.asarray(part, dtype=np.int64)) for part in (moving.row, moving.col))
    constant = np.asarray(matrix[:, [-1]].todense(), dtype=np.float64).reshape(-1)
    return AffineMap(rows, columns, torch.as_tensor(np.array(moving.data, dtype=np.float64)), torch.as_tensor(constant))


def _entries(reduced: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the entries that the rows of ``reduced.reduced_mat`` stand for."""
    if reduced.problem_data_index is None:  # no constraints at all
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    indices, starts, _ = reduced.problem_data_index
    return np.asarray(indices, dtype=np.int64), np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _square(reduced: Any, n: int) -> tuple[Pattern | None, AffineMap | None]:
    pattern = square_pattern(reduced, n)
    return (None, None) if pattern is None else (pattern, _affine(reduced.reduced_mat.tocsr()))


def square_pattern(reduced: Any, n: int) -> Pattern | None:
    """The pattern of P, None where the objective is linear.

    Args:
        reduced: CVXPY's reduced matrix.
        n: the unknowns.
    """
    if reduced is None or reduced.reduced_mat is None or reduced.problem_data_index is None or reduced.reduced_mat.shape[0] == 0:
        return None
    rows, columns = _entries(reduced)
    return Pattern(torch.as_tensor(rows), torch.as_tensor(columns), (n, n))


def _rows(reduced: Any, n: int, m: int) -> tuple[Pattern, AffineMap, AffineMap]:
    """A and b: CVXPY says (A, b) (x, 1) ∈ K, where here the slack is b − A x."""
    pattern, inside, where = split_rows(reduced, n, m)
    matrix = reduced.reduced_mat.tocsr()
    A_map = _affine(-matrix[inside.numpy()])
    beside = _affine(matrix[(~inside).numpy()])
    constant = torch.zeros(m, dtype=torch.float64).index_add(0, where, beside.constant)
    return pattern, A_map, AffineMap(where[beside.rows], beside.columns, beside.entries, constant)


def split_rows(reduced: Any, n: int, m: int) -> tuple[Pattern, Tensor, Tensor]:
    """The pattern of A, which entries of CVXPY's (A, b) belong to it, and the rows of the others.

    Args:
        reduced: CVXPY's reduced matrix.
        n: the unknowns.
        m: the rows.
    """
    rows, columns = (torch.as_tensor(part) for part in _entries(reduced))
    inside = columns < n
    return Pattern(rows[inside], columns[inside], (m, n)), inside, rows[~inside]


def _recovery(how: Any, owner: Any) -> Recovery:
    """``owner`` is the constraint of a dual variable and its place there."""
    shape = tuple(how.shape)
    if how.source == "primal":
        where = torch.arange(how.primal.start, how.primal.stop)
        if how.unpack_fn == "svec_primal":  # the upper triangle, row by row
            order = shape[0]
            square = torch.empty(shape, dtype=torch.int64)
            rows, columns = torch.triu_indices(order, order)
            square[rows, columns] = square[columns, rows] = where
            return Recovery(False, square, None, shape)
        return Recovery(False, _by_columns(where, shape), None, shape)
    constraint, k = owner
    kind = type(constraint).__name__
    first = how.dual.start - sum(int(dual.size) for dual in constraint.dual_variables[:k])
    if how.unpack_fn == "svec_dual":
        order = shape[0]
        square = torch.empty(shape, dtype=torch.int64)
        factors = torch.empty(shape, dtype=torch.float64)
        rows, columns, scale = triangle(order, torch.device("cpu"))
        square[rows, columns] = square[columns, rows] = first + torch.arange(len(rows))
        factors[rows, columns] = factors[columns, rows] = 1 / scale
        return Recovery(True, square, factors, shape)
    size = int(np.prod(shape, dtype=int))
    if kind in ("ExpCone", "PowCone3D"):  # cone by cone, three rows each
        return Recovery(True, _by_columns(first + k + 3 * torch.arange(size), shape), None, shape)
    if kind == "SOC":  # cone by cone, t and then the vector
        heads = int(constraint.dual_variables[0].size)
        length = int(constraint.dual_variables[1].size) // heads
        starts = first + (length + 1) * torch.arange(heads)
        if k == 0:
            return Recovery(True, _by_columns(starts, shape), None, shape)
        vectors = starts.unsqueeze(-1) + 1 + torch.arange(length)
        if len(shape) == 2 and constraint.axis == 0:
            vectors = vectors.T
        return Recovery(True, vectors.reshape(shape), None, shape)
    return Recovery(True, _by_columns(torch.arange(first, first + size), shape), None, shape)


def _by_columns(where: Tensor, shape: tuple[int, ...]) -> Tensor:
    return where.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if shape else where.reshape(())
