r"""The optimality conditions of a conic program, as the root problem that the core differentiates.

.. math:: \min_x \tfrac12 x^T P x + q^T x \quad\text{subject to}\quad A x + s = b,\; s \in K.

With the multiplier y in the dual cone and v = s − y, Moreau's decomposition gives s = Π(v), y = Π(v) − v for the projection Π onto K, and
the conditions are one equation in x and v:

.. math:: F(x, v) = \begin{pmatrix} P x + q + A^T (\Pi(v) - v) \\ A x + \Pi(v) - b \end{pmatrix} = 0,
    \qquad J = \begin{pmatrix} P & A^T (D - I) \\ A & D \end{pmatrix}, \quad D = \mathrm{D}\Pi(v).

A compiled solver finds the point (:mod:`~difflayers.convex.cone_solvers`); Newton's method on F, with the factor that the
derivatives use (:mod:`~difflayers.convex.cone_factor`), sharpens it where it falls short. F is bilinear in (P, q, A, b) and the
unknowns, so its pullback is a product for each entry of the pattern.

References: Agrawal, Barratt, Boyd, Busseti and Moursi, Differentiating through a cone program, J. Appl. Numer. Optim. 2019,
arXiv:1904.09043; Ali, Wong and Kolter, A semismooth Newton method for fast, generic convex programming, ICML 2017, arXiv:1705.00772.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..implicit.broadcasting import BroadcastingProblem
from ..solution import OnFailure, Solution, Status, report_failures
from ..solvers.linearize import vjp
from .cone_certificates import proves_infeasible, proves_unbounded
from .cone_factor import ConeFactor
from .cone_geometry import project, spectrum
from .cone_polish import polish, residual_at
from .cone_solvers import Program, solve_programs
from .cone_structure import Structure

__all__ = ["ConeOptions", "ConeProblem", "ConeSolution"]

# A linearized system that is solved to a larger relative residual has no solution there.
_SINGULAR_ABOVE = 1e-6
# Refinement with a factor made nearby is good enough below this relative residual.
_NEARBY_BELOW = 1e-11


class ConeSolution(NamedTuple):
    """What :func:`solve_cone` returns; x, y and s are differentiable.

    Attributes:
        x: ``(*batch, n)``, the minimizer.
        y: ``(*batch, m)``, multipliers of A x + s = b, in the dual cone.
        s: ``(*batch, m)``, the slack b − A x, in the cone.
        status: ``(*batch,)`` codes of :class:`~difflayers.Status`.
        primal_residual: ``(*batch,)``, the largest entry of A x + s − b.
        dual_residual: ``(*batch,)``, the largest entry of P x + q + Aᵀ y.
        duality_gap: ``(*batch,)``, ``|xᵀPx + qᵀx + bᵀy|``.
        iterations: ``(*batch,)`` int64, those of the solver.
    """

    x: Tensor
    y: Tensor
    s: Tensor
    status: Tensor
    primal_residual: Tensor
    dual_residual: Tensor
    duality_gap: Tensor
    iterations: Tensor


class ConeOptions(NamedTuple):
    """How a program is solved; ``lenient``: who sets a limit of iterations is warned, not refused, if it is reached."""

    tol: float
    max_iter: int | None
    solver: str
    solver_args: dict[str, Any]
    on_failure: OnFailure
    warm: bool
    name: str = "solve_cone"
    lenient: bool = False


class ConeProblem(BroadcastingProblem):
    """The optimality conditions as a root problem; θ = (values of P or None, q, values of A, b), which broadcast by themselves."""

    core_ndims = (1,) * 4

    def __init__(self, structure: Structure, options: ConeOptions) -> None:
        super().__init__(len(structure.batch), residual=functools.partial(_residual, structure), on_failure=options.on_failure)
        self.structure, self.options = structure, options
        # What the search leaves to the derivatives: the slack, and a factor made nearby.
        self._slack: Tensor | None = None
        self._nearby: ConeFactor | None = None

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """Solve every element, polish what is not sharp, report the failures, and keep the factor if there is one."""
        structure, options, batch = self.structure, self.options, self.structure.batch
        if math.prod(batch) == 0:
            status = torch.zeros(batch, dtype=torch.int64, device=x0.device)
            return (x0.clone(), status, *x0.new_zeros(3, *batch), status.clone())
        flat = _flat(theta, structure)
        P, q, A, b = flat
        program = Program(structure.P, structure.A, structure.cones, P, q, A, b)
        start = x0.reshape(-1, x0.shape[-1]) if options.warm else None
        found = solve_programs(program, options.solver, options.solver_args, options.tol, options.max_iter, start)
        point = torch.cat([found.x, found.s - found.y], -1)
        point = torch.where(torch.isfinite(point).all(-1, keepdim=True), point, 0)
        infeasible, unbounded = (found.status == code for code in (Status.PRIMAL_INFEASIBLE, Status.DUAL_INFEASIBLE))
        if options.solver != "QP":  # that engine has checked its own
            infeasible = infeasible & proves_infeasible(structure, flat, found.y)
            unbounded = unbounded & proves_unbounded(structure, flat, found.x)
        unproved = (found.status == Status.PRIMAL_INFEASIBLE) | (found.status == Status.DUAL_INFEASIBLE)
        found = found._replace(status=torch.where(unproved & ~infeasible & ~unbounded, int(Status.MAX_ITER), found.status))
        certain = infeasible | unbounded | (found.status == Status.NUMERICAL_ERROR)
        if options.max_iter is not None:  # who sets a limit wants the point that it gives
            certain |= found.status == Status.MAX_ITER
        polished = polish(structure, point, found.s, flat, ~certain, options.tol)
        point, slack, measured = polished.point, polished.slack, polished.measured
        self._nearby = polished.factor
        relative, primal, dual, gap = measured
        status = torch.where(certain, found.status, torch.where(relative <= options.tol, int(Status.SOLVED), found.status))
        # The solver's word counts for nothing where the conditions do not hold.
        status = torch.where((status == Status.SOLVED) & ~(relative <= options.tol), int(Status.MAX_ITER), status)
        diagnostics = [part.reshape(batch) for part in (status, primal, dual, gap, found.iterations)]
        point = point.reshape(*batch, -1)
        self._slack = slack.reshape(*batch, -1)
        x, v = structure.split(point)
        solution = ConeSolution(x, self._slack - v, self._slack, *diagnostics)
        if options.lenient and options.max_iter is not None and options.on_failure == "raise":
            limited = solution.status == Status.MAX_ITER
            report_failures(solution._replace(status=torch.where(limited, solution.status, 0)), options.name, "warn")
            solution = solution._replace(status=torch.where(limited, 0, solution.status))
        report_failures(solution, options.name, options.on_failure)
        return (point, *diagnostics)

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        """Solve J u = rhs, or Jᵀ u = rhs, with the factor of this point: made once, used by every derivative."""
        z, *theta = point
        if rhs.numel() == 0:
            status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
            return Solution(torch.zeros_like(rhs), status, rhs.new_zeros(rhs.shape[:-1]), status)
        flat = rhs.reshape(*rhs.shape[: int(columns)], -1, rhs.shape[-1])
        solved, residual = self._solve_flat(z, theta, flat, transpose)
        residual = residual.reshape(rhs.shape[:-1])
        status = torch.where(residual <= _SINGULAR_ABOVE, int(Status.SOLVED), int(Status.SINGULAR))
        return Solution(solved.reshape(rhs.shape), status, residual, torch.zeros_like(status))

    def operator(self, point: Sequence[Any], transpose: bool) -> Callable[[Tensor], Tensor]:
        """``u -> J u`` or ``u -> Jᵀ u``. D is symmetric for every v: its products are pullbacks either way."""
        structure = self.structure
        z, P, _, A, _ = point
        _, v = structure.split(z)
        _, pullback = vjp(functools.partial(project, structure.cones), v)

        def product(u: Tensor) -> Tensor:
            u_x, u_v = structure.split(u)
            Au = structure.A.times(A, u_x)
            if transpose:
                first = structure.A.times(A, u_v, transpose=True)
                second = pullback(Au + u_v)[0] - Au
            else:
                turned = pullback(u_v)[0]
                first = structure.A.times(A, turned - u_v, transpose=True)
                second = Au + turned
            return torch.cat([first if structure.P is None else first + structure.P.times(P, u_x), second], -1)

        return product

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> list[Tensor]:
        """(∂F/∂θ)ᵀ u in closed form, one product for each entry of the patterns."""
        structure = self.structure
        x, v = structure.split(x)
        u_x, u_v = structure.split(u)
        P, A = structure.P, structure.A

        def of_A() -> Tensor:
            return (self._projected(v) - v)[..., A.rows] * u_x[..., A.columns] + u_v[..., A.rows] * x[..., A.columns]

        def of_P() -> Tensor:
            pattern: Any = P
            return u_x[..., pattern.rows] * x[..., pattern.columns]

        closed = (of_P, lambda: u_x, of_A, lambda: -u_v)
        return [closed[i]().sum_to_size(theta[i].shape) for i in which]

    def pushforward(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], tangents: Sequence[Tensor]) -> Tensor:
        """Σ (∂F/∂θᵢ) tᵢ in closed form."""
        structure = self.structure
        x, v = structure.split(x)
        moved = dict(zip(which, tangents, strict=True))
        first, second = torch.zeros_like(x), torch.zeros_like(v)
        if 0 in moved and structure.P is not None:
            first = first + structure.P.times(moved[0], x)
        if 1 in moved:
            first = first + moved[1]
        if 2 in moved:
            first = first + structure.A.times(moved[2], self._projected(v) - v, transpose=True)
            second = second + structure.A.times(moved[2], x)
        if 3 in moved:
            second = second - moved[3]
        return torch.cat([first, second], -1)

    def _projected(self, v: Tensor) -> Tensor:
        """The slack. The search knows it; a tensor that is differentiated further, or transformed, needs the operations."""
        return self._slack if self._slack is not None and _is_plain(v) else project(self.structure.cones, v)

    def deeper(self, size: int) -> ConeProblem:
        """The same problem with one more leading dimension."""
        return ConeProblem(self.structure._replace(batch=(size, *self.structure.batch)), self.options)

    def _solve_flat(self, z: Tensor, theta: Sequence[Any], rhs: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        if self._factor is None:
            _, v = self.structure.split(z.reshape(-1, z.shape[-1]))
            s = project(self.structure.cones, v) if self._slack is None else self._slack.reshape(v.shape)
            if self._nearby is not None:
                solved, residual = self._nearby.solve_nearby(spectrum(self.structure.cones, v, s), rhs, transpose=transpose)
                if bool((residual < _NEARBY_BELOW).all()):
                    return solved, residual
                self._nearby = None
            self._factor = ConeFactor(self.structure, v, s, _flat(theta, self.structure))
        return self._factor.solve(rhs, transpose=transpose)


def _residual(structure: Structure, z: Tensor, *theta: Any) -> Tensor:
    return residual_at(structure, z, project(structure.cones, structure.split(z)[1]), theta)


def _is_plain(tensor: Tensor) -> bool:
    """Whether no transform and no graph looks at a tensor."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor):
        return False
    return forward_ad._current_level < 0 or forward_ad.unpack_dual(tensor).tangent is None


def _flat(theta: Sequence[Any], structure: Structure) -> list[Any]:
    """The arguments with one batch dimension."""
    count = math.prod(structure.batch)
    return [None if leaf is None else leaf.expand(*structure.batch, leaf.shape[-1]).reshape(count, leaf.shape[-1]) for leaf in theta]
