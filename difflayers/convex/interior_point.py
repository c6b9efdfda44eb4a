r"""Batched interior point method for dense convex QPs, finished by exact active-set solves under a KKT certificate.

For :math:`\min \tfrac12 x^\top P x + q^\top x` subject to :math:`Ax = b`, :math:`Cx + s = d`, :math:`s \ge 0` (C stacks G, −I and I for
the bounds, and d their limits) the iterates follow the central path :math:`s_i z_i = \sigma\mu` by Mehrotra's predictor and corrector
from an infeasible start. With residuals r, weights :math:`w = z/s` and the small ε and δ of the proximal method of multipliers,

.. math:: (P + \delta + \varepsilon^{-1} A^\top A + C^\top \mathrm{diag}(w) C)\,\Delta x
   = -r_x - \varepsilon^{-1} A^\top r_y - C^\top (w r_s - r_c / s), \qquad
   \Delta y = \varepsilon^{-1} (A \Delta x + r_y), \qquad \Delta z = w (C\Delta x + r_s) - r_c / s,

so an iteration costs one batched Cholesky factor, whatever the ranks of P and A, and the residuals of the next iterate correct what
the proximal terms and rounding left. As soon as an element's guess of its active set {z > s} settles, that set is solved exactly; a
violated sign or row changes the guess once or twice (a semismooth Newton step). The solution is accepted if it satisfies all the
optimality conditions, and its element leaves the batch. Elements that diverge are handed to the certificates.

References:
    S. Mehrotra, On the implementation of a primal-dual interior point method, SIAM J. Optim. 2 (1992).
    J. Nocedal, S. Wright, Numerical Optimization (2006), section 16.6.
    M. Hintermüller, K. Ito, K. Kunisch, The primal-dual active set strategy as a semismooth Newton method, SIAM J. Optim. 13 (2002).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..solution import Status
from .active_set import PINNED, ActiveSetFactor, polish
from .certificates import (
    feasibility_problem,
    infeasibility_certificate,
    nearest_point_problem,
    proves_infeasible,
    proves_unbounded,
    recession_problem,
)
from .normal_equations import PENALTY, DenseQP, KKTError, KKTPoint, NormalEquations, kkt_error, product, stable_cholesky, take

__all__ = ["DenseResult", "solve_dense"]

_ABSENT = 1e20  # limits beyond are none
_CACHE = 1 << 30  # bytes of data that are worked on at once
_EQUAL = 1e-12  # bounds no further apart than this, relatively, fix their variable
_YOUNG = 8  # the first iterations do not ask whether to stop
_CALM = 1  # changes of the guess since the last iteration that count as rest
_EXACT = 1e-11  # relative KKT error of an active-set solution that ends its element
_SOUND = 1e-8  # relative residual beyond which an attempted active set says nothing about a better one
_CORRECTIONS = 1  # changes of an attempted active set
_VIOLATED = 4  # an attempt that violates this many conditions or more is not corrected
_BOUNDARY = 0.995  # share of the way to the boundary that a step may go
_SCHUR_DAMPING = 1e-9  # keeps the multipliers of dependent equalities from drifting apart
_PATIENCE = 15  # iterations without progress before an element is given up
_DIVERGED = 1e5  # multiples of the size of a problem that make the certificates look at an element


class DenseResult(NamedTuple):
    """The solution of a batch: the point, how it ended, and the factor of its active set.

    Attributes:
        x: ``(B, n)``; for DUAL_INFEASIBLE the ray along which the objective falls; NaN for NUMERICAL_ERROR.
        y: ``(B, p)`` multipliers of the equalities; for PRIMAL_INFEASIBLE the multipliers are a Farkas certificate.
        z: ``(B, m)`` ≥ 0.
        z_lower: ``(B, n)`` ≥ 0, or None without bounds.
        z_upper: ``(B, n)`` ≥ 0, or None without bounds.
        status: ``(B,)`` int64 codes of :class:`Status`, decided by the measured optimality conditions or a verified certificate.
        primal_residual: ``(B,)`` largest violation of a constraint.
        dual_residual: ``(B,)`` largest entry of the gradient of the Lagrangian.
        duality_gap: ``(B,)``.
        iterations: ``(B,)`` int64.
        factor: solves with the derivative of the optimality conditions at the solution; of no meaning where the status is not SOLVED.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    z_lower: Tensor | None
    z_upper: Tensor | None
    status: Tensor
    primal_residual: Tensor
    dual_residual: Tensor
    duality_gap: Tensor
    iterations: Tensor
    factor: ActiveSetFactor


def solve_dense(problem: DenseQP, *, tol: float = 1e-9, max_iter: int = 100, start: KKTPoint | None = None) -> DenseResult:
    """Solve a batch of dense convex QPs.

    Args:
        problem: the batch, in float64.
        tol: largest KKT error, relative to one plus the size of the terms it adds up, of a solution. What an active set solves
            exactly is usually at 1e-14.
        max_iter: limit of the interior point iterations.
        start: a solution of nearby problems; its active set is tried first, and costs one factorization where it still holds.

    Returns:
        The solution, with one status per element.
    """
    with torch.no_grad():
        unusable = _screen(problem)
        run = _Run(problem if unusable is None else _replace(problem, unusable[0] | unusable[1]), tol, max_iter)
        error = run.solve(torch.arange(problem.q.shape[0], device=problem.q.device), start=start)
        status = torch.where(error.relative <= tol, int(Status.SOLVED), int(Status.MAX_ITER))
        if bool((status != Status.SOLVED).any()):
            left = (status != Status.SOLVED).nonzero().squeeze(-1)
            left = _classify(run, status, left)
            if left.numel():
                error = run.solve(left, watch=False)
                status[left] = torch.where(error.relative[left] <= tol, int(Status.SOLVED), int(Status.MAX_ITER))
        if unusable is not None:
            _mark_unusable(problem, run.point, error, status, *unusable)
        return DenseResult(*run.point, status, *error[:3], run.iterations, run.factor)


def _screen(problem: DenseQP) -> tuple[Tensor, Tensor] | None:
    """Elements whose limits contradict each other by themselves, and elements with data that are not numbers; None if there are none."""
    P, q, G, h, A, b, lb, ub = problem
    sound = torch.isfinite(P.sum() + q.sum() + G.sum() + A.sum() + b.sum()) & (h > -torch.inf).all()
    if lb is not None and ub is not None:
        sound = sound & ((lb <= ub) & (lb < torch.inf) & (ub > -torch.inf)).all()
    if bool(sound):
        return None
    broken, impossible = h.isnan().any(-1), h.isneginf().any(-1)
    for tensor in (P, q, G, A, b):
        broken = broken | ~torch.isfinite(tensor).flatten(1).all(-1)
    if lb is not None and ub is not None:
        broken = broken | (lb.isnan() | ub.isnan()).any(-1)
        impossible = impossible | ((lb > ub) | lb.isposinf() | ub.isneginf()).any(-1)
    return impossible & ~broken, broken


def _replace(problem: DenseQP, dropped: Tensor) -> DenseQP:
    """The ``dropped`` elements become an easy problem, their own numbers being of no use."""
    easy = {"P": 0.0, "q": 0.0, "G": 0.0, "h": 1.0, "A": 0.0, "b": 0.0, "lb": -1.0, "ub": 1.0}
    fields: dict[str, Tensor] = {}
    for name, value in easy.items():
        tensor = getattr(problem, name)
        if tensor is not None and tensor.shape[0] < dropped.shape[0]:
            fields[name] = torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)  # what is shared broke every element
        elif tensor is not None:
            fields[name] = torch.where(dropped.view(-1, *(1,) * (tensor.dim() - 1)), value, tensor)
    return DenseQP(**fields)


class _Factor:
    """Solves KΔx + AᵀΔy = force, AΔx = −r_y with the Cholesky factor L of K and the Schur complement YᵀY, Y = L⁻¹Aᵀ."""

    def __init__(self, lower: Tensor, A: Tensor) -> None:
        self.lower, self.equalities = lower, A.shape[1]
        if self.equalities:
            self.half = torch.linalg.solve_triangular(lower, A.mT, upper=False)
            self.schur = stable_cholesky(self.half.mT @ self.half, _SCHUR_DAMPING)

    def solve(self, force: Tensor, r_y: Tensor) -> tuple[Tensor, Tensor]:
        half, dy = torch.linalg.solve_triangular(self.lower, force.mT, upper=False), r_y
        if self.equalities:
            dy = NormalEquations.solve(self.schur, half.mT @ self.half + r_y)
            half = half - self.half @ dy.mT
        return torch.linalg.solve_triangular(self.lower.mT, half, upper=True).mT, dy


def _typical(values: Tensor) -> Tensor:
    """The geometric mean of the positive among ``values`` ``(B, 1, M)``, which one huge limit does not spoil; 1 if there are none."""
    positive = values > 0
    total = torch.where(positive, values.log(), 0.0).sum(-1, keepdim=True)
    return (total / positive.sum(-1, keepdim=True).clamp(min=1)).exp()


class _Run:
    """What is known about every element of one batch: its best point, the error of that, and the factor of its active set."""

    def __init__(self, problem: DenseQP, tol: float, max_iter: int) -> None:
        self.problem, self.tol, self.max_iter = problem, tol, max_iter
        self.equations = NormalEquations(problem)
        (batch, n), m, p = problem.q.shape, problem.G.shape[1], problem.A.shape[1]
        new = problem.q.new_empty
        bounds = (None, None) if problem.lb is None else (new(batch, n), new(batch, n))
        self.point = KKTPoint(new(batch, n), new(batch, p), new(batch, m), *bounds)
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=problem.q.device)
        self.factor: ActiveSetFactor | None = None

    def solve(self, ids: Tensor, *, start: KKTPoint | None = None, watch: bool = True) -> KKTError:
        """Solve the elements ``ids`` and keep what comes out, solved or not; with ``watch``, give up those that diverge."""
        rows, n = self.equations.rows.shape[1:]
        memory = 8 * n * (4 * n + 3 * rows)
        for part in ids.split(max(_CACHE // max(memory, 1), 1)):
            work = _Work(self, part)
            if start is not None:
                work.resume(KKTPoint(*(None if t is None else t[part] for t in start)))
            work.iterate(watch)
        return kkt_error(self.problem, self.point)

    def record(self, ids: Tensor, hits: Tensor, point: KKTPoint, factor: ActiveSetFactor, iteration: int) -> None:
        """Keep the final state of the elements ``ids``: the rows ``hits`` of what is given."""
        if factor.equations is self.equations and hits.numel() == self.iterations.numel():
            self.factor = factor
        else:
            self.factor = factor.blank(self.equations) if self.factor is None else self.factor
            self.factor.insert(ids, factor, hits)
        for target, source in zip(self.point, point, strict=True):
            if target is not None:
                target[ids] = source[hits]
        self.iterations[ids] += iteration


class _Work:
    """The elements still at work. Vectors are rows ``(B, 1, ·)``; the inequalities are stacked: G, lower bounds, upper bounds.

    An absent inequality becomes 0ᵀx ≤ 1 and keeps its place. A variable with equal bounds is pinned to them and has no inequalities.
    """

    def __init__(self, run: _Run, ids: Tensor) -> None:
        self.run, self.ids, self.iteration = run, ids, 0
        whole = ids.shape[0] == run.problem.q.shape[0]
        self.equations = run.equations if whole else run.equations.take(ids)
        unit, lengths = (t if whole else take(t, ids) for t in (run.equations.unit, run.equations.lengths))
        problem = self.equations.problem
        self.n, self.m, self.p = problem.q.shape[1], problem.G.shape[1], problem.A.shape[1]
        self.fixed = self.pin = self.guess = self.tried = self.tried_mu = self.best = self.merit = self.age = None
        self.bounded = problem.lb is not None and problem.ub is not None
        limits = torch.cat((problem.h, -problem.lb, problem.ub), -1) if self.bounded else problem.h
        present = limits < _ABSENT
        if self.bounded:
            width = problem.ub - problem.lb
            fixed = (width <= _EQUAL * (1 + problem.lb.abs())) & (width < torch.inf)
            if bool(fixed.any()):
                present[:, self.m :] &= ~torch.cat((fixed, fixed), -1)
                self.fixed = fixed.unsqueeze(1)
                self.pin = PINNED * self.equations.scale * self.fixed
        self.mask = None if bool(present.all()) else present.unsqueeze(1)
        lengths = lengths[..., self.p :].expand(limits.shape[0], 1, self.m)
        lengths = torch.cat((lengths, lengths.new_ones(limits.shape[0], 1, limits.shape[1] - self.m)), -1) if self.bounded else lengths
        push = problem.q.abs().amax(-1).view(-1, 1, 1)
        distance = torch.where(present, limits, 0.0).unsqueeze(1).abs() / lengths.sqrt()
        self.size = _typical(distance)
        self.limits = torch.where(present.unsqueeze(1), limits.unsqueeze(1), self.size)
        self.ratio = (unit + 0.5 * push / self.size) / lengths
        self.tolerance = -_EXACT * (1 + torch.cat((push / lengths.sqrt(), self.limits.abs()), 1))

    def resume(self, start: KKTPoint) -> None:
        """Try the active set of a solution of a problem nearby."""
        stacked = (start.z, start.z_lower, start.z_upper) if self.bounded else (start.z,)
        self.x, self.y, self.z = start.x.unsqueeze(1), start.y.unsqueeze(1), torch.cat(stacked, -1).unsqueeze(1)
        guess = self.z > self.ratio * self._slack(self.x)
        if self.mask is not None:
            guess &= self.mask
        self._keep(~self.attempt(torch.arange(self.ids.shape[0], device=self.ids.device), guess))

    def iterate(self, watch: bool) -> None:
        """Run until every element is finished or given up."""
        if self.ids.numel() == 0:
            return
        if self.limits.shape[-1] == 0:
            self._without_inequalities()
            return
        self.begin()
        for self.iteration in range(self.run.max_iter + 1):
            leaving = self.settle()
            if self.iteration >= _YOUNG or self.iteration == self.run.max_iter:
                ended = self.ended(watch) & ~leaving
                if bool(ended.any()):
                    self.give_up(ended.nonzero().squeeze(-1))
                leaving = leaving | ended
            self._keep(~leaving)
            if self.ids.numel() == 0:
                return
            self.advance()

    def _without_inequalities(self) -> None:
        problem = self.equations.problem
        self.x, self.y, self.z = (torch.zeros_like(t).unsqueeze(1) for t in (problem.q, problem.b, problem.h))
        self.best = self.x, self.y, self.z
        left = ~self.attempt(torch.arange(self.ids.shape[0], device=self.ids.device), self.z > 0)
        if bool(left.any()):
            self.give_up(left.nonzero().squeeze(-1))

    def begin(self) -> None:
        """Every constraint becomes a spring of its natural stiffness; its force and its length, made positive on one hyperbola, are z and s."""
        problem = self.equations.problem
        x = torch.zeros_like(problem.q) if self.fixed is None else torch.where(self.fixed.squeeze(1), problem.lb, 0.0)
        self.x, self.y = x.unsqueeze(1), torch.zeros_like(problem.b).unsqueeze(1)
        self.r_y = product(self.x, self.equations.problem.A.mT) - problem.b.unsqueeze(1)
        length = -self._slack(self.x)
        dx, self.y = self._factorize(self.ratio).solve(self._force(self.ratio * length), self.r_y)
        self.x, self.r_y, growth = self.x + dx, self.r_y + product(dx, self.equations.problem.A.mT), self._inequalities(dx)
        root = self.ratio.sqrt()
        pull = (length + growth) * root
        pull = pull if self.mask is None else pull * self.mask
        spread = torch.maximum(_typical(pull.abs()), 0.3 * pull.square().mean(-1, keepdim=True).sqrt()).square()
        away = (pull.square() + 4 * spread).sqrt()
        self.z, self.s = (away + pull) / 2 * root, (away - pull) / 2 / root
        self.r_s = self.s - self._slack(self.x)

    def advance(self) -> None:
        """One predictor and corrector step."""
        weights = self.z / self.s
        factor = self._factorize(weights)
        loads = weights * self.r_s
        force = self._force(loads)
        growth = self._inequalities(factor.solve(force, self.r_y)[0])
        dz, ds = loads + weights * growth - self.z, -self.r_s - growth
        step = 1 / torch.maximum(-ds / self.s, -dz / self.z).amax(-1, keepdim=True).clamp(min=1)
        ahead = ((self.z + step * dz) * (self.s + step * ds)).mean(-1, keepdim=True)
        centre = ((ahead / self.mu).clamp(max=1) ** 3 * self.mu - ds * dz) / self.s
        loads = loads + centre
        dx, dy = factor.solve(force - self._pull(centre), self.r_y)
        growth = self._inequalities(dx)
        dz, ds = loads + weights * growth - self.z, -self.r_s - growth
        step = 1 / (torch.maximum(-ds / self.s, -dz / self.z).amax(-1, keepdim=True) / _BOUNDARY).clamp(min=1)
        self.x, self.y, self.z, self.s = self.x + step * dx, self.y + step * dy, self.z + step * dz, self.s + step * ds
        self.r_y, self.r_s = (1 - step) * self.r_y, (1 - step) * self.r_s

    def settle(self) -> Tensor:
        """Solve exactly where the guess of the active set came to rest; ``(B,)`` bool, the elements finished by that."""
        self.mu = (self.z * self.s).mean(-1, keepdim=True)
        guess = self.z > self.s * self.ratio
        guess = guess if self.mask is None else guess & self.mask
        if self.guess is None:
            self.guess, self.tried, self.tried_mu = guess, torch.zeros_like(guess), self.mu
            return torch.zeros_like(self.ids, dtype=torch.bool)
        calm = (guess != self.guess).sum(-1, keepdim=True) <= _CALM
        calm = calm & ((guess != self.tried).any(-1, keepdim=True) | (self.mu < 1e-3 * self.tried_mu))
        self.guess = guess
        if not bool(calm.any()):
            return calm.flatten() & False
        self.tried, self.tried_mu = torch.where(calm, guess, self.tried), torch.where(calm, self.mu, self.tried_mu)
        index = calm.flatten().nonzero().squeeze(-1)
        return self.attempt(index, guess[index])

    def attempt(self, index: Tensor, active: Tensor) -> Tensor:
        """Try an active set, and a few that the violated conditions suggest after it; ``(B,)`` bool, the elements solved."""
        whole = index.numel() == self.ids.numel()
        equations = self.equations if whole else self.equations.take(index)
        x, y, z = (self.x, self.y, self.z) if whole else (self.x[index], self.y[index], self.z[index])
        solved, violated = torch.zeros_like(self.ids, dtype=torch.bool), _VIOLATED
        for _ in range(_CORRECTIONS + 1):
            x, y, z, residual, factor = polish(equations, x, y, z, active, None if self.fixed is None else self.fixed[index])
            slack = self._slack(x, index, equations)
            good = (residual.squeeze(-1) <= _EXACT) & (torch.cat((z, slack), 1) >= self.tolerance[index]).flatten(1).all(-1)
            hits = good.nonzero().squeeze(-1)
            if hits.numel():
                self.run.record(self.ids[index[hits]], hits, self._point(x, y, z), factor, self.iteration)
                solved[index[hits]] = True
                if hits.numel() == index.numel():
                    break
            better = z > slack * self.ratio[index]
            better = better if self.mask is None else better & self.mask[index]
            count = (better != active).sum(-1).squeeze(-1)
            sound = (residual <= _SOUND).squeeze(-1)
            again = (~good & sound & (count > 0) & (count < violated)).nonzero().squeeze(-1)
            if again.numel() == 0:
                break
            index, equations, violated = index[again], equations.take(again), count[again]
            x, y, z, active = x[again], y[again], z[again], better[again]
        return solved

    def ended(self, watch: bool) -> Tensor:
        """Elements that converged, stopped making progress or, with ``watch``, run away; ``(B,)`` bool."""
        problem, rows = self.equations.problem, self.equations.rows
        q, b = problem.q.unsqueeze(1), problem.b.unsqueeze(1)
        curve, rows_x = product(self.x, problem.P), product(self.x, rows.mT)
        pull = product(torch.cat((self.y, self.z[..., : self.m]), -1), rows)
        pull = pull + self._bound_pull(self.z) if self.bounded else pull
        value = (b * self.y).sum(-1, keepdim=True) + (self.limits * self.z).sum(-1, keepdim=True)
        r_x = curve + q + pull
        if self.fixed is not None:
            value = value - (pull * self.x * self.fixed).sum(-1, keepdim=True)
            r_x, pull = r_x * ~self.fixed, pull * ~self.fixed
        self.r_y, self.r_s = rows_x[..., : self.p] - b, self.s - self._slack(self.x)
        bend, fall = (curve * self.x).sum(-1, keepdim=True), (q * self.x).sum(-1, keepdim=True)
        parts = (
            r_x / (1 + torch.maximum(curve.abs(), q.abs()).amax(-1, keepdim=True)),
            self.r_y / (1 + b.abs()),
            self.r_s / (1 + self.limits.abs()),
            self.mu * self.z.shape[-1] / (1 + bend.abs() + fall.abs()),
        )
        merit = torch.cat(parts, -1).abs().amax(-1, keepdim=True).nan_to_num(torch.inf)
        now = (self.x, self.y, self.z)
        if self.best is None:
            self.best, self.merit, self.age = now, merit, torch.zeros_like(self.ids)
        better = merit < self.merit
        self.age = torch.where((merit < 0.5 * self.merit).flatten(), 0, self.age + 1)
        self.best = tuple(torch.where(better, new, old) for new, old in zip(now, self.best, strict=True))
        self.merit = torch.minimum(self.merit, merit)
        over = (self.merit <= 1e-2 * self.run.tol) | ~torch.isfinite(self.x).all(-1, keepdim=True)
        if watch:
            size = _DIVERGED * self.size
            infeasible = -value > size * pull.abs().amax(-1, keepdim=True)
            unbounded = (self.x.abs().amax(-1, keepdim=True) > size) & (100 * bend < -fall)
            over = over | infeasible | unbounded
        return over.flatten() | (self.age >= _PATIENCE) | (self.iteration == self.run.max_iter)

    def give_up(self, index: Tensor) -> None:
        """Keep the best iterate of the elements ``index``, or the solution of its active set if that is nearer to optimal."""
        equations = self.equations if index.numel() == self.ids.numel() else self.equations.take(index)
        x, y, z = (t[index] for t in self.best)
        z = z if self.mask is None else z * self.mask[index]
        active = z > self.ratio[index] * self._slack(x, index, equations)
        active = active if self.mask is None else active & self.mask[index]
        fixed = None if self.fixed is None else self.fixed[index]
        *exact, _, factor = polish(equations, x, y, z, active, fixed, rescue=True)
        if fixed is not None:
            z = self._price_fixed(equations, x, y, z, fixed)
        points = [self._point(x, y, z), self._point(*exact)]
        errors = [kkt_error(equations.problem, point).relative for point in points]
        better = (errors[1] < errors[0]).unsqueeze(-1)
        point = KKTPoint(*(None if old is None else torch.where(better, new, old) for old, new in zip(*points, strict=True)))
        self.run.record(self.ids[index], torch.arange(index.numel(), device=index.device), point, factor, self.iteration)

    def _factorize(self, weights: Tensor) -> _Factor:
        diagonal = None
        if self.bounded:
            lower, upper = self._bounds(weights)
            diagonal = lower + upper
            diagonal = diagonal if self.pin is None else diagonal + self.pin
        return _Factor(self.equations.factorize(weights[..., : self.m], diagonal), self.equations.problem.A)

    def _force(self, loads: Tensor) -> Tensor:
        """−(Px + q) − Aᵀ(y + ε⁻¹ r_y) − Cᵀ loads, the right-hand side that K needs when z is eliminated."""
        problem, load_rows = self.equations.problem, loads[..., : self.m]
        if self.p:
            load_rows = torch.cat((self.y + PENALTY * self.equations.row_scale[..., : self.p] * self.r_y, load_rows), -1)
        pull = product(load_rows, self.equations.rows)
        pull = pull + self._bound_pull(loads) if self.bounded else pull
        return -(product(self.x, problem.P) + problem.q.unsqueeze(1) + pull)

    def _pull(self, loads: Tensor) -> Tensor:
        """Cᵀ loads."""
        pull = product(loads[..., : self.m], self.equations.problem.G)
        return pull + self._bound_pull(loads) if self.bounded else pull

    def _inequalities(self, x: Tensor) -> Tensor:
        """C x."""
        value = product(x, self.equations.problem.G.mT)
        return torch.cat((value, self._signed(x)), -1) if self.bounded else value

    def _slack(self, x: Tensor, index: Tensor | slice = slice(None), equations: NormalEquations | None = None) -> Tensor:
        """The limits minus C x."""
        rows = (self.equations if equations is None else equations).rows
        value = product(x, rows[:, self.p :].mT)
        if self.bounded:
            value = torch.cat((value, self._signed(x, index)), -1)
        return self.limits[index] - value

    def _signed(self, x: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        signed = torch.cat((-x, x), -1)
        return signed if self.mask is None else signed * self.mask[index][..., self.m :]

    def _bounds(self, stacked: Tensor) -> tuple[Tensor, Tensor]:
        part = stacked[..., self.m :] if self.mask is None else stacked[..., self.m :] * self.mask[..., self.m :]
        return part[..., : self.n], part[..., self.n :]

    def _bound_pull(self, loads: Tensor) -> Tensor:
        lower, upper = self._bounds(loads)
        return upper - lower

    def _point(self, x: Tensor, y: Tensor, z: Tensor) -> KKTPoint:
        z = z.clamp(min=0).squeeze(1)
        bounds = (z[:, self.m : self.m + self.n], z[:, self.m + self.n :]) if self.bounded else (None, None)
        return KKTPoint(x.squeeze(1), y.squeeze(1), z[:, : self.m], *bounds)

    def _price_fixed(self, equations: NormalEquations, x: Tensor, y: Tensor, z: Tensor, fixed: Tensor) -> Tensor:
        """z with what the bounds of the fixed variables must hold: the gradient of the Lagrangian."""
        gradient = product(x, equations.problem.P) + equations.problem.q.unsqueeze(1)
        gradient = (gradient + product(torch.cat((y, z[..., : self.m]), -1), equations.rows)) * fixed
        return z + torch.cat((torch.zeros_like(z[..., : self.m]), gradient.clamp(min=0), (-gradient).clamp(min=0)), -1)

    def _keep(self, mask: Tensor) -> None:
        """Leave only these elements at work."""
        if bool(mask.all()):
            return
        index = mask.nonzero().squeeze(-1)
        if index.numel():
            self.equations = self.equations.take(index)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[index])
        self.best = None if self.best is None else tuple(t[index] for t in self.best)


def _classify(run: _Run, status: Tensor, left: Tensor) -> Tensor:
    """Prove the unsolved elements ``left`` infeasible or unbounded where they are; returns those that are neither."""
    problem = run.problem.take(left)
    point = _solution(feasibility_problem(problem), run)[0]
    certificate = infeasibility_certificate(problem, point)
    size = run.equations.size[left].flatten() + certificate.x.abs().sum(-1)
    infeasible = proves_infeasible(problem, certificate, size)
    status[left[infeasible]] = int(Status.PRIMAL_INFEASIBLE)
    for target, source in zip(run.point, certificate, strict=True):
        if target is not None:
            target[left[infeasible]] = source[infeasible]
    maybe = (~infeasible).nonzero().squeeze(-1)
    if maybe.numel():
        problem = problem.take(maybe)
        ray = _solution(recession_problem(problem), run)[0].x
        nearest = nearest_point_problem(problem, certificate.x[maybe])
        feasible = _solution(nearest, run)[1].relative <= run.tol
        unbounded = feasible & proves_unbounded(problem, ray)
        index = left[maybe[unbounded]]
        status[index] = int(Status.DUAL_INFEASIBLE)
        run.point.x[index] = ray[unbounded] / ray[unbounded].abs().amax(-1, keepdim=True)
    return left[status[left] == Status.MAX_ITER]


def _solution(problem: DenseQP, run: _Run) -> tuple[KKTPoint, KKTError]:
    auxiliary = _Run(problem, run.tol, run.max_iter)
    error = auxiliary.solve(torch.arange(problem.q.shape[0], device=problem.q.device), watch=False)
    return auxiliary.point, error


def _mark_unusable(problem: DenseQP, point: KKTPoint, error: KKTError, status: Tensor, impossible: Tensor, broken: Tensor) -> None:
    """Say of the elements that were replaced why they have no solution."""
    status[impossible], status[broken] = int(Status.PRIMAL_INFEASIBLE), int(Status.NUMERICAL_ERROR)
    if problem.lb is not None and problem.ub is not None:
        crossed = (problem.lb > problem.ub).to(problem.q.dtype)
        point.z_lower[impossible], point.z_upper[impossible] = crossed[impossible], crossed[impossible]
    for tensor in (*point, *error):
        if tensor is not None:
            tensor[broken] = torch.nan
    for tensor in error:
        tensor[impossible] = torch.inf
