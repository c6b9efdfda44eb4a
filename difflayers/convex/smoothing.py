r"""Smoothed quadratic programs: a point of the central path in place of the solution, and its exact derivative.

A vertex does not move with the cost, so the derivative of a linear program in q is zero almost everywhere, and that of a quadratic
program forgets its inactive constraints. With a logarithmic barrier of weight μ > 0,

.. math:: \min_x \tfrac12 x^T P x + q^T x - \mu \sum_i \log (h - Gx)_i - \mu \sum_j \log (u - x)_j - \mu \sum_j \log (x - l)_j
   \quad\text{subject to}\quad A x = b,

every constraint pushes a little, and the solution is a smooth function of all arguments. With s = h − Gx its optimality conditions are

.. math:: F = \left(P x + q + A^T y + G^T z + w,\;\; A x - b,\;\; z \circ s - \mu,\;\;
   w - \frac{\mu}{u - x} + \frac{\mu}{x - l}\right) = 0.

Its objective is above the least one by at most μ for each constraint (that is the duality gap, which the solution reports), and it tends
to the solution as μ → 0. The derivative is that of this point, not an approximation of another. In the linear systems z and w are
eliminated, which leaves

.. math:: \begin{pmatrix} P + G^T \mathrm{diag}(z/s)\, G + D & A^T \\ A & 0 \end{pmatrix}, \qquad
   D = \mathrm{diag}\left(\frac{\mu}{(u-x)^2} + \frac{\mu}{(x-l)^2}\right).

References: J. Mandi and T. Guns, Interior point solving for LP-based prediction+optimisation, NeurIPS 2020, arXiv:2010.13943;
S. Boyd and L. Vandenberghe, Convex Optimization (2004), section 11.2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..implicit.function import Problem
from ..solution import Solution, Status, report_failures
from .active_set import ActiveSetFactor
from .central_path import CentralPath, Outcome
from .interior_point import replaced, screen, solve_dense, without_huge_limits
from .kkt import SINGULAR_ABOVE, KKTProblem, Options, QPSolution, Sizes, flat_problem, stationarity, times
from .normal_equations import DenseQP, KKTPoint, kkt_error, product

__all__ = ["SmoothedProblem"]

_CONVERGED = 1e-11  # relative error of the conditions, and of each product of a multiplier and its slack
_PATIENCE = 15  # iterations without progress before an element is given up
_ROUNDING = 1e-3  # a slack is known to this share of the converged error of the terms that it is the difference of


class SmoothedProblem(KKTProblem):
    """The conditions of the barrier problem as a root problem whose batches broadcast by themselves."""

    def __init__(self, sizes: Sizes, options: Options) -> None:
        super().__init__(sizes, options)
        self.residual = functools.partial(_residual, sizes, options.smoothing)

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        """(∂F/∂θ)ᵀ u, by differentiating F: the closed form of the active set does not apply."""
        return Problem.pullback(self, x, theta, which, u)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """Follow the central path to μ. What does not get there is given to the engine that can say why."""
        if 0 in self.sizes.batch:
            return super().find(x0, theta)
        problem = without_huge_limits(flat_problem(theta, self.sizes))
        unusable = screen(problem)
        problem = problem if unusable is None else replaced(problem, unusable[0] | unusable[1])
        path = _SmoothedPath(problem, self.options)
        point, reached = path.run()
        status = torch.where(reached, int(Status.SOLVED), int(Status.MAX_ITER))
        if unusable is not None:
            status[unusable[0]], status[unusable[1]] = int(Status.PRIMAL_INFEASIBLE), int(Status.NUMERICAL_ERROR)
        left = (status == Status.MAX_ITER).nonzero().squeeze(-1)
        if left.numel():  # solvable, but without an interior or with a set of minimizers without end: that stays MAX_ITER
            why = solve_dense(problem.take(left), tol=self.options.tol).status
            status[left] = torch.where(why == Status.SOLVED, int(Status.MAX_ITER), why)
        error, sides = kkt_error(problem, point), []
        if self.sizes.boxed:
            sides = [point.z_upper - point.z_lower]
        row = torch.cat([point.x, point.y, point.z, *sides], -1).reshape(*self.sizes.batch, -1)
        measured = [part.reshape(self.sizes.batch) for part in (status, *error[:3], path.outcome.iterations)]
        report_failures(QPSolution(*self.sizes.split(row), *measured), "solve_qp, smoothed", self.on_failure)
        return (torch.nan_to_num(row, nan=0.0, posinf=0.0, neginf=0.0), *measured)

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        """Solve with the Jacobian of F, or its transpose, by the matrix in x and y that is left when z and w are eliminated."""
        if rhs.numel() == 0:
            return super().solve_linear(point, rhs, transpose, columns)
        w, *theta = point
        problem = flat_problem(theta, self.sizes)
        x, _, z, _ = self.sizes.split(w.reshape(-1, w.shape[-1]))
        absent, mu = torch.isinf(problem.h), self.options.smoothing
        slack = torch.where(absent, 1.0, torch.where(absent, 0.0, problem.h) - _forward(problem.G, x))
        gain, stiffness = torch.where(absent, 0.0, z), torch.zeros_like(x)
        if self.sizes.boxed:
            stiffness = mu * ((problem.ub - x) ** -2 + (x - problem.lb) ** -2)
        if self._factor is None:
            self._factor = _BarrierFactor(problem, gain / slack, stiffness)
        r_x, r_y, r_z, r_box = self.sizes.split(rhs.reshape(*rhs.shape[: int(columns)], -1, rhs.shape[-1]))
        force = r_x + _forward(problem.G.mT, gain * r_z / slack) if transpose else r_x - _forward(problem.G.mT, r_z / slack)
        if r_box is not None:
            force = force + stiffness * r_box if transpose else force - r_box
        u_x, u_y, residual = self._factor.solve(force, r_y)
        growth = _forward(problem.G, u_x)
        parts = [u_x, u_y, (r_z - growth if transpose else r_z + gain * growth) / slack]
        if r_box is not None:
            parts.append(r_box - u_x if transpose else r_box + stiffness * u_x)
        residual = residual.reshape(rhs.shape[:-1])
        status = (residual > SINGULAR_ABOVE) * int(Status.SINGULAR)
        return Solution(torch.cat(parts, -1).reshape(rhs.shape), status, residual, torch.zeros_like(status))


class _BarrierFactor:
    """Solves with the matrix in x and y: the active-set system of a problem with equations only, whose P has swallowed the barrier.

    Args:
        problem: the batch.
        weights: ``(B, m)``, of the rows of G.
        stiffness: ``(B, n)``, of the bounds.
    """

    def __init__(self, problem: DenseQP, weights: Tensor, stiffness: Tensor) -> None:
        P = problem.P + torch.diag_embed(stiffness) + problem.G.mT @ (weights.unsqueeze(-1) * problem.G)
        self._none = weights[:, :0]
        core = DenseQP(P, problem.q, problem.G[:, :0], self._none, problem.A, problem.b)
        self._factor = ActiveSetFactor(core, self._none.bool())

    def solve(self, force: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x and y with P' x + Aᵀ y = force and A x = target, ``(*R, B, ·)``, and the relative residual."""
        step, residual = self._factor.solve(KKTPoint(force, target, self._none.expand(*force.shape[:-1], 0)))
        return step.x, step.y, residual


class _Steps(NamedTuple):
    """A `_BarrierFactor` as the central path asks for it."""

    factor: _BarrierFactor

    def solve(self, force: Tensor, r_y: Tensor) -> tuple[Tensor, Tensor]:
        dx, dy, _ = self.factor.solve(force.squeeze(1), -r_y.squeeze(1))
        return dx.unsqueeze(1), dy.unsqueeze(1)


class _SmoothedPath(CentralPath):
    """The central path to the weight μ of the barrier, and no further; each step is refined, as no active set is solved in the end."""

    penalty = 0.0

    def __init__(self, problem: DenseQP, options: Options) -> None:
        everything = torch.arange(problem.q.shape[0], device=problem.q.device)
        super().__init__(Outcome(problem), everything, options.tol, options.max_iter, strict=True)
        self.target = options.smoothing

    def run(self) -> tuple[KKTPoint, Tensor]:
        """The points, and whether they were reached."""
        problem = self.outcome.problem
        width = (0, 0) if problem.lb is None else (self.n, self.n)
        shapes = (self.n, self.p, self.m, *width)
        rows = [problem.q.new_zeros(self.ids.shape[0], size) for size in shapes]
        reached = torch.zeros_like(self.ids, dtype=torch.bool)
        self.begin()
        self.least, self.idle = torch.full_like(self.x[:, 0, 0], torch.inf), torch.zeros_like(self.ids)
        for iteration in range(self.max_iter + 1):
            self.mu = (self.z * self.s).mean(-1, keepdim=True) if self.z.shape[-1] else self.z.new_zeros(self.ids.shape[0], 1, 1)
            error = self.error()
            self.idle = torch.where(error < 0.5 * self.least, 0, self.idle + 1)
            self.least = torch.minimum(self.least, error)
            over = (error <= _CONVERGED) | ~torch.isfinite(error) | (self.idle >= _PATIENCE) | (iteration == self.max_iter)
            if bool(over.any()):
                index, where = over.nonzero().squeeze(-1), self.ids[over]
                z = self.z if self.mask is None else self.z * self.mask
                for target, source in zip(rows, self._point(self.x, self.y, z), strict=False):
                    target[where] = source[index] if source is not None else 0.0
                reached[where] = error[index] <= _CONVERGED
                self.outcome.iterations[where] = iteration
                self._keep(~over)
            if self.ids.numel() == 0 or bool(over.all()):
                break
            self.advance()
        bounds = (None, None) if problem.lb is None else (rows[3], rows[4])
        return KKTPoint(*rows[:3], *bounds), reached

    def _factorize(self, weights: Tensor) -> Any:
        lower, upper = self._bounds(weights) if self.bounded else (torch.zeros_like(self.x), 0.0)
        return _Steps(_BarrierFactor(self.equations.problem, weights[:, 0, : self.m], (lower + upper).squeeze(1)))

    def aim(self, ahead: Tensor, curvature: Tensor) -> Tensor:
        """As before, but not past μ: from there on Newton's method without the second-order term of a step to zero."""
        centre = (ahead / self.mu).clamp(max=1) ** 3 * self.mu
        return torch.where(centre > self.target, centre - curvature, self.target)

    def error(self) -> Tensor:
        """``(B,)``: the largest relative error of a condition; infinite where a variable has no room."""
        problem, rows = self.equations.problem, self.equations.rows
        q, b = problem.q.unsqueeze(1), problem.b.unsqueeze(1)
        curve = product(self.x, problem.P)
        pull = product(torch.cat((self.y, self.z[..., : self.m]), -1), rows)
        pull = pull + self._bound_pull(self.z) if self.bounded else pull
        self.r_y, self.r_s = product(self.x, rows.mT)[..., : self.p] - b, self.s - self._slack(self.x)
        size = torch.stack((curve.abs(), q.abs(), pull.abs())).amax((0, -1), keepdim=True)[0]
        parts = (
            (curve + q + pull) / torch.where(size > 0, size, 1.0),
            self.r_y / (1 + b.abs()),
            self.r_s / (self.s + _ROUNDING * (self.limits.abs() + (self.limits - self.s).abs())),
            self.z * self.s / self.target - 1,
        )
        error = torch.cat(parts, -1).abs().amax(-1).squeeze(1).nan_to_num(torch.inf)
        return error if self.fixed is None else torch.where(self.fixed.any(-1).squeeze(1), torch.inf, error)


def _forward(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Products of ``(B or 1, k, n)`` with vectors ``(*R, B, n)``."""
    return (matrix @ vectors.unsqueeze(-1)).squeeze(-1)


def _residual(sizes: Sizes, mu: float, w: Tensor, *theta: Any) -> Tensor:
    _, _, G, h, A, b, lb, ub = theta
    x, _, z, z_box = sizes.split(w)
    rows = [stationarity(sizes, w, theta)]
    if A is not None:
        rows.append(times(A, x) - b)
    if G is not None:
        absent = torch.isinf(h)
        rows.append(torch.where(absent, z, z * (torch.where(absent, 0.0, h) - times(G, x)) - mu))
    if z_box is not None:
        rows.append(z_box - mu / (ub - x) + mu / (x - lb))
    return torch.cat(rows, -1)
