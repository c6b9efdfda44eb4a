r"""A CVXPY problem with parameters as a layer: a drop-in for ``cvxpylayers.torch.CvxpyLayer``.

The problem is canonicalized once (:mod:`~difflayers.convex.canonicalization`). A call maps the parameters to the data of a conic program,
solves it (:mod:`~difflayers.convex.cone_program`) and reads the variables off its solution. The core differentiates the solution, to any
order and in both modes; what surrounds it is affine.

Reference: Agrawal, Amos, Barratt, Boyd, Diamond and Kolter, Differentiable convex optimization layers, NeurIPS 2019, arXiv:1910.12430.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ShapeError, SolveError
from ..implicit.eager import eager
from ..solution import OnFailure
from .canonicalization import Canonical, canonicalize
from .cone import solve_rows
from .cone_program import ConeOptions
from .cone_solvers import ACCURACY, IGNORED, automatic_solver, known_solver
from .cone_structure import Structure

__all__ = ["CvxpyLayer", "CvxpySolution"]

# The names of cvxpylayers' backends: what they mean here is "choose".
_CHOOSE = (None, "DIFFCP", "MOREAU", "CUCLARABEL", "MPAX")


class CvxpySolution(NamedTuple):
    """What :meth:`CvxpyLayer.solve` returns.

    Attributes:
        values: the variables, each ``(*batch, *shape)``; differentiable.
        status: ``(*batch,)`` codes of :class:`~difflayers.Status`.
        residual: ``(*batch,)``, the larger of the primal and the dual residual of the canonical program.
        iterations: ``(*batch,)`` int64.
    """

    values: tuple[Tensor, ...]
    status: Tensor
    residual: Tensor
    iterations: Tensor


class CvxpyLayer(nn.Module):
    r"""A parametrized CVXPY problem as a layer: tensors for its parameters in, a tuple of its variables out.

    Drop-in for ``cvxpylayers.torch.CvxpyLayer``: the same arguments, call and tuple. What is added: derivatives of any order, in
    reverse and forward mode, under ``torch.func``; a status for each element of the batch and ``on_failure``; float32 in,
    float32 out. Parameters that are declared symmetric are read as their symmetric part, and their gradients are symmetric.

    A failure with ``on_failure="raise"`` is an error of :mod:`difflayers.errors` and, where diffcp is installed, also a
    ``diffcp.SolverError``.

    Args:
        problem: a ``cvxpy.Problem`` that follows the DPP rules.
        parameters: its parameters, in the order of the tensors of a call.
        variables: variables of the problem, or dual variables of its constraints, to be returned.
        solver: None chooses: the dense QP engine where the constraints are linear and few or dense, Clarabel elsewhere. "CLARABEL" or "SCS"
            fixes the solver. The backends of cvxpylayers (as "DIFFCP" and "MOREAU") mean None. As in cvxpylayers,
            ``quad_form(x, P)`` with a parameter P needs one by name.
        gp: the problem is a geometric program.
        verbose: CVXPY and the solver say what they do.
        canon_backend: CVXPY's canonicalization backend.
        solver_args: settings of the solver; "eps" and "max_iters" are understood for all. They can be given to a call, too. A solver that
            stops at a limit set here is not failing: its point is returned as it is, with a warning.
        on_failure: ``"raise"``, ``"nan"`` (failed elements are NaN and have zero gradient) or ``"warn"`` (best iterate).

    Raises:
        MissingExtraError: cvxpy or cvxpylayers is not installed.
        ValueError: the problem is not DPP, or parameters and variables do not belong to it.

    Example:
        >>> import cvxpy as cp
        >>> import torch
        >>> from difflayers import CvxpyLayer
        >>> x, a = cp.Variable(2), cp.Parameter(2)
        >>> layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 1]), [a], [x])
        >>> point = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> (nearest,) = layer(point)
        >>> nearest.detach()
        tensor([0.6000, 0.8000])
        >>> torch.autograd.grad(nearest[0], point)[0]
        tensor([ 0.1280, -0.0960])
    """

    def __init__(
        self,
        problem: Any,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        solver: str | None = None,
        gp: bool = False,
        verbose: bool = False,
        canon_backend: str | None = None,
        solver_args: dict[str, Any] | None = None,
        *,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if not (solver is None or isinstance(solver, str)):
            raise TypeError(
                f"solver={solver!r} is an object with a derivative of its own: pass it to cvxpylayers.torch.CvxpyLayer; here it is a name"
            )
        if solver not in _CHOOSE:
            known_solver(solver)
        self.solver, self.gp, self.verbose = solver, gp, verbose
        self.solver_args = dict(solver_args or {})
        self.on_failure: OnFailure = on_failure
        self._last: Tensor | None = None
        self.canonical = canonicalize(
            problem,
            parameters,
            variables,
            gp=gp,
            verbose=verbose,
            canon_backend=canon_backend,
            quadratic=solver not in (None, "DIFFCP"),
        )

    def forward(self, *params: Tensor, solver_args: dict[str, Any] | None = None, warm_start: bool = False) -> tuple[Tensor, ...]:
        """The variables at the solution.

        Args:
            params: one tensor for each parameter, of its shape or with one batch dimension in front; what has none is shared.
            solver_args: settings for this call, in addition to those of the layer.
            warm_start: begin at the layer's last solution, if it was of the same batch and the solver can (the dense engine, SCS).

        Returns:
            One tensor for each variable, with the batch dimension if any parameter has it.

        Raises:
            ValueError: wrong number or shapes of tensors.
            InfeasibleError, UnboundedError, NotConvergedError: some elements have no solution (``on_failure="raise"``).
        """
        return self.solve(*params, solver_args=solver_args, warm_start=warm_start).values

    @eager
    def solve(
        self,
        *params: Tensor,
        solver_args: dict[str, Any] | None = None,
        warm_start: bool = False,
        on_failure: OnFailure | None = None,
    ) -> CvxpySolution:
        """As ``forward``, with status, residual and iterations.

        Args:
            params: as in ``forward``.
            solver_args: as in ``forward``.
            warm_start: as in ``forward``.
            on_failure: for this call; None is the layer's.
        """
        canonical = self.canonical
        batch = _check(params, canonical.shapes)
        dtype = functools.reduce(torch.promote_types, (param.dtype for param in params))
        dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
        row = _row(canonical, params, batch)
        theta = [None if each is None else each.to(row.device)(row) for each in canonical.maps]
        on_failure = self.on_failure if on_failure is None else on_failure
        try:
            x, y, *diagnostics = self._solve(theta, {**self.solver_args, **(solver_args or {})}, warm_start, dtype, on_failure)
        except SolveError as error:
            solution = error.solution
            if hasattr(solution, "x"):
                residual = torch.maximum(solution.primal_residual, solution.dual_residual)
                solution = self._recover(solution.x, solution.y, solution.status, residual, solution.iterations, dtype)
            raise _also_diffcp(type(error))(str(error), solution=solution, indices=error.indices) from None
        return self._recover(x, y, *diagnostics, dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Without the last solution, which belongs to this process."""
        return {**self.__dict__, "_last": None}

    def extra_repr(self) -> str:
        """The sizes of the canonical program, and the options."""
        shown = [f"unknowns={self.canonical.A.shape[1]}", f"rows={self.canonical.A.shape[0]}", f"on_failure={self.on_failure!r}"]
        shown += [f"{name}={value!r}" for name, value in (("solver", self.solver), ("solver_args", self.solver_args)) if value]
        return ", ".join(shown + (["gp=True"] if self.gp else []))

    def _solve(
        self, theta: list[Tensor | None], solver_args: dict[str, Any], warm_start: bool, dtype: torch.dtype, on_failure: OnFailure
    ) -> list[Any]:
        """x, y, status, residual and iterations."""
        canonical = self.canonical
        device = _device(theta)
        tol = 1e-8 if dtype == torch.float64 else 1e-6
        method = str(solver_args.pop("solve_method", "")).upper()
        # A limit called max_iters is one of SCS, the solver of cvxpylayers that is meant where none is named.
        scs = method == "SCS" or (self.solver in (None, "DIFFCP") and not method and "max_iters" in solver_args)
        name = self.solver if self.solver not in _CHOOSE else "SCS" if scs else None
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in theta if part is not None))
        structure = Structure(tuple(batch), canonical.cones, _on(canonical.P, device), _on(canonical.A, device))
        if self.verbose:
            solver_args = {"verbose": True, **solver_args}
        limits = [int(solver_args.pop(key)) for key in ("max_iters", "max_iter") if key in solver_args]
        limit = limits[0] if limits else None
        # The dense engine has no settings but an accuracy: who sets more means a solver.
        simple = limit is None and not self.verbose and not set(solver_args) - IGNORED - ACCURACY
        name = name or (automatic_solver(canonical.cones, canonical.P, canonical.A) if simple else "CLARABEL")
        start = self._last if warm_start and self._last is not None and self._last.shape[:-1] == structure.batch else None
        start = None if start is None or not bool(start.isfinite().all()) else start.to(device)
        options = ConeOptions(tol, limit, name, solver_args, on_failure, start is not None, "CvxpyLayer", lenient=True)
        needs_duals = any(recovery.dual for recovery in canonical.recoveries)
        *found, point = solve_rows(structure, theta, options, start=start, duals=needs_duals)
        if not torch._C._functorch.is_functorch_wrapped_tensor(point):
            self._last = point
        return found

    def _recover(
        self, x: Tensor, y: Tensor | None, status: Tensor, residual: Tensor, iterations: Tensor, dtype: torch.dtype
    ) -> CvxpySolution:
        values = []
        for recovery in self.canonical.recoveries:
            value = recovery(x, y)
            # Geometric programs are solved in the logarithms of their variables.
            values.append((torch.exp(value) if self.gp and not recovery.dual else value).to(dtype))
        return CvxpySolution(tuple(values), status, residual.to(dtype), iterations)


def _check(params: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The batch dimensions of the parameters: none or one."""
    if len(params) != len(shapes):
        raise ValueError(f"A tensor must be provided for each CVXPY parameter; received {len(params)} tensors, expected {len(shapes)}")
    batches = []
    for i, (param, shape) in enumerate(zip(params, shapes, strict=True)):
        came, extra = tuple(param.shape), len(param.shape) - len(shape)
        if extra not in (0, 1):
            raise ShapeError(
                f"Invalid parameter dimensionality for parameter {i}: expected {len(shape)} dimensions, or one more for a batch, got {came}"
            )
        if came[extra:] != shape:
            raise ShapeError(f"Invalid parameter shape for parameter {i}: expected {shape}, or (batch, *shape), got {came}")
        batches.append(came[:extra])
    sizes = {batch for batch in batches if batch}
    if len(sizes) > 1:
        raise ShapeError(f"Inconsistent batch sizes: the parameters have {[batch[0] if batch else None for batch in batches]}")
    return sizes.pop() if sizes else ()


def _row(canonical: Canonical, params: Sequence[Tensor], batch: tuple[int, ...]) -> Tensor:
    """All the parameters in one row of float64, ``(*batch, columns)``, in the order of the canonical form."""
    parts = []
    for i, triangle in canonical.order:
        param, ndim = params[i].to(torch.float64), len(canonical.shapes[i])
        if canonical.logarithms[i]:
            param = torch.log(param)
        if triangle is not None:
            rows, columns = (index.to(param.device) for index in triangle)
            entries = ((param + param.mT) / 2)[..., rows, columns]
        else:
            lead = param.dim() - ndim
            # CVXPY flattens by columns.
            entries = param.permute((*range(lead), *reversed(range(lead, param.dim())))).reshape(
                *param.shape[:lead], math.prod(canonical.shapes[i])
            )
        parts.append(entries.expand(*batch, entries.shape[-1]))
    return torch.cat(parts, -1) if parts else torch.zeros(0, dtype=torch.float64)


def _device(theta: list[Tensor | None]) -> torch.device:
    return next(part.device for part in theta if part is not None)


def _on(pattern: Any, device: torch.device) -> Any:
    if pattern is None or pattern.rows.device == device:
        return pattern
    with torch._C._DisableFuncTorch():  # an index made inside a transform would belong to its level
        return pattern._replace(rows=pattern.rows.to(device), columns=pattern.columns.to(device))


@functools.cache
def _also_diffcp(error: type[SolveError]) -> type[SolveError]:
    """The same error, which is diffcp's, too: code written for cvxpylayers catches that one."""
    try:
        from diffcp import SolverError
    except ImportError:
        return error
    return type(error.__name__, (error, SolverError), {"__module__": error.__module__, "__doc__": error.__doc__})
