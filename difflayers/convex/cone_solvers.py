r"""How the solution of a conic program is found: compiled solvers, one program at a time.

Clarabel is the default: an interior-point method for every cone here, with a quadratic objective. It is asked for more digits than its
own defaults, because a derivative loses about as many as the solution lacks (:class:`~difflayers.convex.cone_program.ConeProblem`
measures what came and sharpens it). SCS can start from a previous solution. Both release the interpreter lock while they iterate, and
the programs of a batch run in as many threads as ``torch.get_num_threads()``.

References: Goulart and Chen, Clarabel: an interior-point solver for conic programs with quadratic objectives, 2024, arXiv:2405.12762;
O'Donoghue, Chu, Parikh and Boyd, Conic optimization via operator splitting and homogeneous self-dual embedding, JOTA 2016,
arXiv:1312.3039.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConvergenceWarning, MissingExtraError
from ..solution import Status
from .cone_geometry import Cones, project
from .cone_structure import Pattern
from .qp import QPSolution, solve_qp

__all__ = ["ACCURACY", "IGNORED", "Found", "Program", "automatic_solver", "known_solver", "lower_triangles", "solve_programs"]


# The dense engine for quadratic programs is the faster one for unknowns and rows up to the first number, and up to the second where at
# least this share of the optimality conditions is not zero: measured on projections, portfolios, control and denoising.
_SMALL, _DENSE_LIMIT, _DENSE_FROM = 180, 400, 0.1


class Program(NamedTuple):
    """A batch of conic programs with common patterns; the values are plain rows ``(batch, ...)``."""

    P_pattern: Pattern | None
    A_pattern: Pattern
    cones: Cones
    P: Tensor | None
    q: Tensor
    A: Tensor
    b: Tensor


class Found(NamedTuple):
    """What a solver says, not yet checked: x, s, y and a status for each program."""

    x: Tensor
    s: Tensor
    y: Tensor
    status: Tensor
    iterations: Tensor


class _Compressed(NamedTuple):
    """A matrix by columns, as the solvers take it: values of the pattern go to ``where``, and are added up there."""

    indices: np.ndarray
    starts: np.ndarray
    where: np.ndarray
    chosen: np.ndarray
    shape: tuple[int, int]

    def values(self, rows: np.ndarray) -> np.ndarray:
        """The values ``(batch, nnz)`` of the matrix, from those of the pattern."""
        gathered = np.zeros((len(rows), len(self.indices)))
        if len(self.where) == len(self.indices):
            gathered[:, self.where] = rows[:, self.chosen]
        else:
            np.add.at(gathered.T, self.where, rows[:, self.chosen].T)
        return gathered

    def matrix(self, values: np.ndarray) -> Any:
        import scipy.sparse

        return scipy.sparse.csc_matrix((values, self.indices, self.starts), shape=self.shape)


class _Data(NamedTuple):
    """The programs as arrays."""

    P: _Compressed
    A: _Compressed
    P_values: np.ndarray
    q: np.ndarray
    A_values: np.ndarray
    b: np.ndarray
    cones: Cones


# x, s, y, status, iterations of one program
_Answer = tuple[np.ndarray, np.ndarray, np.ndarray, Status, int]


def solve_programs(
    program: Program, solver: str, solver_args: dict[str, Any], tol: float, max_iter: int | None, start: Tensor | None
) -> Found:
    """Solve every program of the batch with the solver of that name.

    Args:
        program: the batch.
        solver: a key of the solvers known here, in capitals.
        solver_args: the solver's own settings, which win over what is set here.
        tol: the relative residual that will be asked of the solution; the solver is asked for two digits more.
        max_iter: the limit of its iterations; None is the solver's own.
        start: rows (x, s − y) to start from, for a solver that can.
    """
    if solver == "QP":
        return _quadratic(program, solver_args, tol, max_iter, start)
    device = program.q.device
    data = _arrays(program)
    given = np.concatenate([data.P_values, data.q, data.A_values, data.b], -1)
    finite = [bool(np.isfinite(row).all()) for row in given]
    solve = _SOLVERS[solver](data, solver_args, tol, max_iter, None if start is None else _triples(start, program))
    nothing = (np.zeros(program.q.shape[-1]), np.zeros(data.b.shape[-1]), np.zeros(data.b.shape[-1]), Status.NUMERICAL_ERROR, 0)

    def one(i: int) -> _Answer:
        return solve(i) if finite[i] else nothing

    workers = min(torch.get_num_threads(), len(finite))
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            answers = list(pool.map(one, range(len(finite))))
    else:
        answers = [one(i) for i in range(len(finite))]
    x, s, y = (torch.as_tensor(np.stack([answer[k] for answer in answers])) for k in range(3))
    status = torch.tensor([int(answer[3]) for answer in answers])
    return Found(*(part.to(device) for part in (x, s, y, status, torch.tensor([answer[4] for answer in answers]))))


def _triples(start: Tensor, program: Program) -> tuple[np.ndarray, ...]:
    """x, s and y of rows (x, s − y)."""
    n = program.q.shape[-1]
    x, v = start[:, :n], start[:, n:]
    s = project(program.cones, v)
    return tuple(part.cpu().numpy() for part in (x, s, s - v))


def _quadratic(program: Program, solver_args: dict[str, Any], tol: float, max_iter: int | None, start: Tensor | None) -> Found:
    """The dense engine for quadratic programs, all the batch at once."""
    zero, P = program.cones.zero, None
    matrix = program.A_pattern.dense(program.A)
    if program.P_pattern is not None and program.P is not None:
        P = program.P_pattern.dense(program.P)
    rows = (matrix[..., zero:, :], program.b[..., zero:]) if program.cones.nonneg else (None, None)
    equations = (matrix[..., :zero, :], program.b[..., :zero]) if zero else (None, None)
    accuracy = min([tol, *(float(value) for name, value in solver_args.items() if name in ACCURACY)])
    warm = None
    if start is not None:
        x, v = start[:, : program.q.shape[-1]], start[:, program.q.shape[-1] :]
        none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        warm = QPSolution(x, -v[:, :zero], (-v[:, zero:]).clamp(min=0), None, none, *x.new_zeros(3, len(x)), none)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ConvergenceWarning)
        accuracy = max(accuracy, 1e-12)
        found = solve_qp(P, program.q, *rows, *equations, tol=accuracy, max_iter=max_iter, warm_start=warm, on_failure="warn")
    y = torch.cat([found.y, found.z], -1)
    slack = program.b - (matrix @ found.x.unsqueeze(-1)).squeeze(-1)
    # A row with a multiplier is active: its slack is zero but for rounding.
    slack = torch.where((y > 0) | (torch.arange(y.shape[-1], device=y.device) < zero), 0, slack.clamp(min=0))
    return Found(found.x, slack, y, found.status, found.iterations)


def automatic_solver(cones: Cones, P: Pattern | None, A: Pattern) -> str:
    """The solver that ``"auto"`` means: the dense engine where the constraints are linear and few, or dense; Clarabel elsewhere."""
    size = sum(A.shape)
    entries = 2 * len(A.rows) + (0 if P is None else len(P.rows))
    dense = size <= _SMALL or (size <= _DENSE_LIMIT and entries >= _DENSE_FROM * size * size)
    return "QP" if cones.polyhedral and dense else "CLARABEL"


def known_solver(name: str) -> str:
    """The name of a solver, checked.

    Raises:
        ValueError: it is not one of those known here.
    """
    if name not in (*_SOLVERS, "QP"):
        raise ValueError(f"solver={name!r} is not known; choose one of {', '.join(map(repr, (*_SOLVERS, 'QP')))}")
    return name


def _arrays(program: Program) -> _Data:
    n = program.q.shape[-1]
    A = _compress(program.A_pattern.rows, program.A_pattern.columns, program.A_pattern.shape, upper=False)
    empty = torch.zeros(0, dtype=torch.int64)
    pattern = program.P_pattern
    P = _compress(empty, empty, (n, n), upper=True) if pattern is None else _compress(pattern.rows, pattern.columns, (n, n), upper=True)
    q, A_values, b = (part.detach().cpu().numpy() for part in (program.q, program.A, program.b))
    P_rows = np.zeros((len(q), 0)) if program.P is None else P.values(program.P.detach().cpu().numpy())
    return _Data(P, A, P_rows, q, A.values(A_values), b, program.cones)


def _compress(rows: Tensor, columns: Tensor, shape: tuple[int, int], *, upper: bool) -> _Compressed:
    i, j = rows.cpu().numpy(), columns.cpu().numpy()
    chosen = (i <= j).nonzero()[0] if upper else np.arange(len(i))
    i, j = i[chosen], j[chosen]
    keys, where = np.unique(j * shape[0] + i, return_inverse=True)
    starts = np.searchsorted(keys, np.arange(shape[1] + 1) * shape[0])
    return _Compressed(keys % max(shape[0], 1), starts, where, chosen, shape)


def _clarabel(
    data: _Data, solver_args: dict[str, Any], tol: float, max_iter: int | None, _: tuple[np.ndarray, ...] | None
) -> Callable[[int], _Answer]:
    clarabel = _module("clarabel")
    settings = _clarabel_settings(clarabel, solver_args, tol, max_iter)
    careful = _clarabel_settings(clarabel, {"direct_solve_method": "faer"} | solver_args, tol, max_iter)
    cones = data.cones
    kinds = [clarabel.ZeroConeT(cones.zero)] if cones.zero else []
    kinds += [clarabel.NonnegativeConeT(cones.nonneg)] if cones.nonneg else []
    kinds += [clarabel.SecondOrderConeT(dim) for dim in cones.soc]
    kinds += [clarabel.PSDTriangleConeT(order) for order in cones.psd]
    kinds += [clarabel.ExponentialConeT()] * cones.exp
    kinds += [clarabel.PowerConeT(alpha) for alpha in cones.pow]
    statuses = clarabel.SolverStatus
    short = {str(statuses.AlmostSolved), str(statuses.InsufficientProgress), str(statuses.NumericalError)}
    meaning = {
        str(statuses.Solved): Status.SOLVED,
        str(statuses.PrimalInfeasible): Status.PRIMAL_INFEASIBLE,
        str(statuses.DualInfeasible): Status.DUAL_INFEASIBLE,
        str(statuses.MaxIterations): Status.MAX_ITER,
        str(statuses.MaxTime): Status.MAX_ITER,
        str(statuses.AlmostSolved): Status.MAX_ITER,
        str(statuses.AlmostPrimalInfeasible): Status.PRIMAL_INFEASIBLE,
        str(statuses.AlmostDualInfeasible): Status.DUAL_INFEASIBLE,
    }

    def solve(i: int) -> _Answer:
        P, A = data.P.matrix(data.P_values[i]), data.A.matrix(data.A_values[i])
        found = clarabel.DefaultSolver(P, data.q[i], A, data.b[i], kinds, settings).solve()
        if str(found.status) in short and "direct_solve_method" not in solver_args:
            # Its other factorization is slower, and keeps more digits where many cones end at their apex.
            found = clarabel.DefaultSolver(P, data.q[i], A, data.b[i], kinds, careful).solve()
        status = meaning.get(str(found.status), Status.NUMERICAL_ERROR)
        if status == Status.NUMERICAL_ERROR:  # it stopped short; what it has may still be good, or may be polished
            status = Status.MAX_ITER
        return np.array(found.x), np.array(found.s), np.array(found.z), status, found.iterations

    return solve


def _clarabel_settings(clarabel: Any, solver_args: dict[str, Any], tol: float, max_iter: int | None) -> Any:
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    settings.presolve_enable = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = min(0.1 * tol, 1e-8)
    if max_iter is not None:
        settings.max_iter = max_iter
    for name, value in solver_args.items():
        if name in ACCURACY:
            settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = min(float(value), settings.tol_feas)
        elif hasattr(settings, name):
            setattr(settings, name, value)
        elif name not in IGNORED:
            raise TypeError(f"Clarabel has no setting {name!r}; see clarabel.DefaultSettings")
    return settings


# What users of cvxpylayers pass to other solvers: the accuracy, and what has no meaning here.
ACCURACY = {"eps", "eps_abs", "eps_rel", "tol", "abstol", "reltol", "feastol"}
IGNORED = {"acceleration_lookback", "mode", "n_jobs_forward", "n_jobs_backward", "solve_method", "warm_start"}


def _scs(
    data: _Data, solver_args: dict[str, Any], tol: float, max_iter: int | None, start: tuple[np.ndarray, ...] | None
) -> Callable[[int], _Answer]:
    scs = _module("scs")
    accuracy = min([0.1 * tol, 1e-8, *(float(value) for name, value in solver_args.items() if name in ACCURACY)])
    settings = {"verbose": False, "eps_abs": accuracy, "eps_rel": accuracy, "max_iters": 100_000 if max_iter is None else max_iter}
    settings |= {name: value for name, value in solver_args.items() if name not in ACCURACY | (IGNORED - {"acceleration_lookback"})}
    cones = data.cones
    sizes = {"z": cones.zero, "l": cones.nonneg, "q": list(cones.soc), "s": list(cones.psd), "ep": cones.exp, "p": list(cones.pow)}
    meaning = {1: Status.SOLVED, -1: Status.DUAL_INFEASIBLE, -2: Status.PRIMAL_INFEASIBLE}
    order = lower_triangles(cones)
    back = np.argsort(order)

    def solve(i: int) -> _Answer:
        P, A = data.P.matrix(data.P_values[i]), data.A.matrix(data.A_values[i])[order].tocsc()
        solver = scs.SCS({"P": P, "A": A, "b": data.b[i][order], "c": data.q[i]}, sizes, **settings)
        if start is None:
            found = solver.solve()
        else:
            x, s, y = (part[i] for part in start)
            found = solver.solve(warm_start=True, x=x, y=y[order], s=s[order])
        status = meaning.get(found["info"]["status_val"], Status.MAX_ITER)
        return found["x"], found["s"][back], found["y"][back], status, found["info"]["iter"]

    return solve


def lower_triangles(cones: Cones) -> np.ndarray:
    """The order in which SCS takes the rows: the lower triangle column by column, which is the upper one row by row."""
    order = np.arange(cones.rows)
    start = cones.zero + cones.nonneg + sum(cones.soc)
    for k in cones.psd:
        i, j = np.triu_indices(k)
        order[start : start + len(i)] = start + j * (j + 1) // 2 + i
        start += len(i)
    return order


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"this solver needs {name}; install it: pip install {name}") from error


_SOLVERS: dict[str, Callable[..., Callable[[int], _Answer]]] = {"CLARABEL": _clarabel, "SCS": _scs}
