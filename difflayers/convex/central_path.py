r"""The central path of a batch of dense QPs: an interior point method that ends in exact solutions of active sets.

For :math:`\min \tfrac12 x^\top P x + q^\top x` subject to :math:`Ax = b`, :math:`Cx + s = d`, :math:`s \ge 0` (C stacks G, −I and I for
the bounds, and d their limits) the iterates follow the central path :math:`s_i z_i = \sigma\mu` by Mehrotra's predictor and corrector
from an infeasible start. With residuals r and weights :math:`w = z/s` a step eliminates s and z and solves

.. math:: \begin{pmatrix} P + \delta + C^\top \mathrm{diag}(w)\, C & A^\top \\ A & 0 \end{pmatrix}
   \begin{pmatrix} \Delta x \\ \Delta y \end{pmatrix} = - \begin{pmatrix} Px + q + A^\top y + C^\top(w r_s + c/s) \\ r_y \end{pmatrix},
   \qquad z + \Delta z = w\,(r_s + C\Delta x) + c/s, \qquad \Delta s = -r_s - C\Delta x,

with c = 0 for the predictor and :math:`c = \sigma\mu - \Delta s\Delta z` for the corrector: one batched Cholesky factor and a small Schur
complement an iteration, whatever the ranks of P and A.

As soon as an element's guess of its active set {z > s} comes to rest, that set is solved exactly; if few conditions are then violated,
they correct the set once (a semismooth Newton step). A solution that satisfies all the optimality conditions ends its element, which
leaves the batch. What happens to an element does not depend on its neighbours.

References:
    S. Mehrotra, On the implementation of a primal-dual interior point method, SIAM J. Optim. 2 (1992).
    J. Nocedal, S. Wright, Numerical Optimization (2006), section 16.6.
    M. Hintermüller, K. Ito, K. Kunisch, The primal-dual active set strategy as a semismooth Newton method, SIAM J. Optim. 13 (2002).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .active_set import PINNED, ActiveSetFactor, polish
from .normal_equations import ABSENT, PENALTY, DenseQP, KKTPoint, NormalEquations, SaddleFactor, kkt_error, product, take

__all__ = ["CentralPath", "Outcome"]

_EQUAL = 1e-12  # bounds no further apart than this, relatively, fix their variable
_YOUNG = 8  # the first iterations do not ask whether to stop
_CALM = 1  # changes of the guess since the last iteration that count as rest
_EXACT = 1e-11  # relative violation of a condition, at most, by a solution that ends its element
_SOUND = 1e-8  # an attempt whose equations are not solved to this relative residual says nothing about a better active set
_CORRECTIONS = 1  # changes of an attempted active set
_LAST_CORRECTIONS = 8  # the same for an element that is given up,
_NEAR = 1e-5  # if its relative KKT error is below this
_VIOLATED = 4  # an attempt that violates this many conditions or more is not corrected
_BOUNDARY = 0.995  # share of the way to the boundary that a step may go
_PATIENCE = 15  # iterations without progress before an element is given up
_DIVERGED = 1e5  # multiples of the size of a problem at which an element counts as running away


class Outcome:
    """What is known of every element of one batch in the end: its point, its iterations, and the factor of its active set."""

    def __init__(self, problem: DenseQP) -> None:
        self.problem, self.equations = problem, NormalEquations(problem)
        (batch, n), m, p = problem.q.shape, problem.G.shape[1], problem.A.shape[1]
        new = problem.q.new_empty
        bounds = (None, None) if problem.lb is None else (new(batch, n), new(batch, n))
        self.point = KKTPoint(new(batch, n), new(batch, p), new(batch, m), *bounds)
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=problem.q.device)
        self.factor: Any = None

    def record(self, ids: Tensor, hits: Tensor, point: KKTPoint, factor: ActiveSetFactor, iteration: int) -> None:
        """Keep the final state of the elements ``ids``: the rows ``hits`` of what is given."""
        if factor.equations is self.equations and hits.numel() == self.iterations.numel():
            self.factor = factor
        else:
            self.factor = factor.blank(self.equations) if self.factor is None else self.factor
            self.factor.insert(ids, factor, hits)
        for target, source in zip(self.point, point, strict=True):
            if target is not None and source is not None:
                target[ids] = source[hits]
        self.iterations[ids] += iteration


class CentralPath:
    """The elements still at work. Vectors are rows ``(B, 1, ·)``; the inequalities are stacked: G, lower bounds, upper bounds.

    An absent inequality becomes 0ᵀx ≤ size and keeps its place. A variable with equal bounds is pinned to them and has no inequalities.

    Args:
        outcome: where the elements go when they are finished or given up.
        ids: ``(B,)`` the elements of that batch to work on.
        tol: relative KKT error wanted.
        max_iter: limit of the iterations.
        strict: whether to go on to the end for every element that is not solved to ``tol``. If not, elements that run away from any
            solution are given up soon, and an exact solution is not measured a second time.
    """

    penalty = PENALTY  # the weight of the equations in K

    def __init__(self, outcome: Outcome, ids: Tensor, tol: float, max_iter: int, *, strict: bool) -> None:
        self.outcome, self.ids, self.tol, self.max_iter, self.strict, self.iteration = outcome, ids, tol, max_iter, strict, 0
        everything = outcome.equations
        whole = ids.shape[0] == outcome.problem.q.shape[0]
        self.equations = everything if whole else everything.take(ids)
        unit, lengths = (t if whole else take(t, ids) for t in (everything.unit, everything.lengths))
        problem = self.equations.problem
        self.n, self.m, self.p = problem.q.shape[1], problem.G.shape[1], problem.A.shape[1]
        # None until the first iteration that has them
        self.fixed: Any = None
        self.pin: Any = None
        self.guess: Any = None
        self.tried: Any = None
        self.tried_mu: Any = None
        self.best: Any = None
        self.merit: Any = None
        self.age: Any = None
        self.bounded = problem.lb is not None and problem.ub is not None
        limits = torch.cat((problem.h, -problem.lb, problem.ub), -1) if self.bounded else problem.h
        present = limits < ABSENT
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
        guess = self._active(self.x, self.z, slice(None), self.equations)
        self._keep(~self.attempt(torch.arange(self.ids.shape[0], device=self.ids.device), guess))

    def follow(self) -> None:
        """Run until every element is finished or given up."""
        if self.ids.numel() == 0:
            return
        if self.limits.shape[-1] == 0:
            self._without_inequalities()
            return
        self.begin()
        for iteration in range(self.max_iter + 1):
            self.iteration = iteration
            leaving = self.settle()
            if iteration >= _YOUNG or iteration == self.max_iter:
                ended = self.ended() & ~leaving
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
        """Let every constraint be a spring of its natural stiffness: its force and its length, put on one hyperbola, are z and s."""
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
        large = (pull.abs() + (pull.square() + 4 * spread).sqrt()) / 2
        small = spread / large
        self.z, self.s = torch.where(pull > 0, large, small) * root, torch.where(pull > 0, small, large) / root
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
        centre = self.aim(ahead, ds * dz) / self.s
        loads = loads + centre
        dx, dy = factor.solve(force - self._pull(centre), self.r_y)
        growth = self._inequalities(dx)
        dz, ds = loads + weights * growth - self.z, -self.r_s - growth
        step = 1 / (torch.maximum(-ds / self.s, -dz / self.z).amax(-1, keepdim=True) / _BOUNDARY).clamp(min=1)
        self.x, self.y, self.z, self.s = self.x + step * dx, self.y + step * dy, self.z + step * dz, self.s + step * ds
        self.r_y, self.r_s = (1 - step) * self.r_y, (1 - step) * self.r_s

    def aim(self, ahead: Tensor, curvature: Tensor) -> Tensor:
        """The products z s to go to, σμ by what the predictor alone would reach, less the second-order term of the way there."""
        return (ahead / self.mu).clamp(max=1) ** 3 * self.mu - curvature

    def settle(self) -> Tensor:
        """Solve exactly where the guess of the active set came to rest; ``(B,)`` bool, the elements finished by that."""
        self.mu = (self.z * self.s).mean(-1, keepdim=True)
        guess = self.z > self.s * self.ratio
        guess = guess if self.mask is None else guess & self.mask
        if self.guess is None:
            self.guess, self.tried, self.tried_mu = guess, torch.zeros_like(guess), torch.full_like(self.mu, torch.inf)
            return torch.zeros_like(self.ids, dtype=torch.bool)
        calm = (guess != self.guess).sum(-1, keepdim=True) <= _CALM
        calm = calm & ((guess != self.tried).any(-1, keepdim=True) | (self.mu < 1e-3 * self.tried_mu))
        self.guess = guess
        if not bool(calm.any()):
            return torch.zeros_like(self.ids, dtype=torch.bool)
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
            if self.strict:
                good &= kkt_error(equations.problem, self._point(x, y, z)).relative <= self.tol
            hits = good.nonzero().squeeze(-1)
            if hits.numel():
                self.outcome.record(self.ids[index[hits]], hits, self._point(x, y, z), factor, self.iteration)
                solved[index[hits]] = True
                if hits.numel() == index.numel():
                    break
            better = self._active(x, z, index, equations)
            count = (better != active).sum(-1).squeeze(-1)
            sound = (residual <= _SOUND).squeeze(-1)
            again = (~good & sound & (count > 0) & (count < violated)).nonzero().squeeze(-1)
            if again.numel() == 0:
                break
            index, equations, violated = index[again], equations.take(again), count[again]
            x, y, z, active = x[again], y[again], z[again], better[again]
        return solved

    def ended(self) -> Tensor:
        """Elements that converged, stopped making progress or, unless ``strict``, run away; ``(B,)`` bool."""
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
        over = (self.merit <= 1e-2 * self.tol) | ~torch.isfinite(self.x).all(-1, keepdim=True)
        if not self.strict:
            size = _DIVERGED * self.size
            infeasible = -value > size * pull.abs().amax(-1, keepdim=True)
            unbounded = (self.x.abs().amax(-1, keepdim=True) > size) & (100 * bend < -fall)
            over = over | infeasible | unbounded
        return over.flatten() | (self.age >= _PATIENCE) | (self.iteration == self.max_iter)

    def give_up(self, index: Tensor) -> None:
        """Keep the best iterate of the elements ``index``, or the solution of an active set near it that is nearer to optimal."""
        equations = self.equations if index.numel() == self.ids.numel() else self.equations.take(index)
        fixed = None if self.fixed is None else self.fixed[index]
        x, y, z = (t[index] for t in self.best)
        z = z if self.mask is None else z * self.mask[index]
        start = x, y, z
        active = chosen = self._active(x, z, index, equations)
        point = self._point(x, y, z if fixed is None else self._price_fixed(equations, x, y, z, fixed))
        error = kkt_error(equations.problem, point).relative
        for _ in range(_LAST_CORRECTIONS):
            x, y, z, *_ = polish(equations, x, y, z, active, fixed, rescue=True)
            exact = self._point(x, y, z)
            exact_error = kkt_error(equations.problem, exact).relative
            better = (exact_error < error).unsqueeze(-1)
            both = zip(point, exact, strict=True)
            point = KKTPoint(*[None if old is None else torch.where(better, new, old) for old, new in both])  # ty: ignore
            error, chosen = torch.minimum(error, exact_error.nan_to_num(torch.inf)), torch.where(better.unsqueeze(-1), active, chosen)
            previous, active = active, self._active(x, z, index, equations)
            if torch.equal(previous, active) or not bool(((error > _EXACT) & (error < _NEAR)).any()):
                break
        *_, factor = polish(equations, *start, chosen, fixed)
        self.outcome.record(self.ids[index], torch.arange(index.numel(), device=index.device), point, factor, self.iteration)

    def _active(self, x: Tensor, z: Tensor, index: Tensor | slice, equations: NormalEquations) -> Tensor:
        """The inequalities that (x, z) suggests to be active: the multiplier outweighs the slack."""
        active = z > self.ratio[index] * self._slack(x, index, equations)
        return active if self.mask is None else active & self.mask[index]

    def _factorize(self, weights: Tensor) -> SaddleFactor:
        diagonal = None
        if self.bounded:
            lower, upper = self._bounds(weights)
            diagonal = lower + upper
            diagonal = diagonal if self.pin is None else diagonal + self.pin
        return SaddleFactor(self.equations.factorize(weights[..., : self.m], diagonal), self.equations.problem.A)

    def _force(self, loads: Tensor) -> Tensor:
        """−(Px + q) − Aᵀ(y + ε⁻¹ r_y) − Cᵀ loads, the right-hand side that K needs when z is eliminated."""
        problem, load_rows = self.equations.problem, loads[..., : self.m]
        if self.p:
            load_rows = torch.cat((self.y + self.penalty * self.equations.row_scale[..., : self.p] * self.r_y, load_rows), -1)
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


def _typical(values: Tensor) -> Tensor:
    """The geometric mean of the positive among ``values`` ``(B, 1, M)``, which one huge limit does not spoil; 1 if there are none."""
    positive = values > 0
    total = torch.where(positive, values.log(), 0.0).sum(-1, keepdim=True)
    return (total / positive.sum(-1, keepdim=True).clamp(min=1)).exp()
