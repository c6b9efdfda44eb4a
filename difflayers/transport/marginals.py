r"""The marginal equations of entropic optimal transport, as the root problem that the core differentiates.

.. math:: F(f, g) = \begin{pmatrix} P 1 - a \\ P^T 1 - b \end{pmatrix} = 0, \qquad P = e^{(f ⊕ g - C)/ε}, \qquad
   \frac{∂F}{∂(f, g)} = \frac{1}{ε} \begin{pmatrix} \operatorname{diag}(P 1) & P \\ P^T & \operatorname{diag}(P^T 1) \end{pmatrix}.

The Jacobian is symmetric at every point. Its null vector (1, −1) changes nothing: it is a constant that moves from f to g. Eliminating the
longer side leaves a Laplacian (:mod:`~difflayers.transport.laplacian`) of the shorter one. The dual value is a second, scalar root problem,
v − L(f, g, θ) = 0 with the Lagrangian L: at the optimum ∂L/∂(f, g) = 0, so that its derivative needs no linear system (the envelope
theorem).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..implicit.broadcasting import BroadcastingProblem, ExplicitProblem
from ..implicit.function import in_a_transform
from ..implicit.stationary import HeldArgument
from ..solution import OnFailure, Solution, Status, report_failures
from .arguments import flattened, marginal_error, what_failed
from .kept import Kept, conjugate_gradients
from .laplacian import Laplacian
from .potentials import Method, find_potentials
from .sweeps import FLOOR, Scaled

__all__ = ["DualValue", "Factor", "Marginals", "Options", "flattened", "plan_of"]

# Plan entries up to here are zero; e^FLOOR is less.
_LEAST = 1e-130

# The rounding of the exponents, in units of the last place of the largest one, that no potentials can undercut.
_NOISE = 8.0

# Groups that exchange less than this part of their mass count as separate: what they would pass on to each other is rounding.
_SEPARATE = 1e-14

# A linearized system with a larger residual, relative to its right-hand side, has no solution. Potentials that are less exact
# leave larger ones.
_SINGULAR_ABOVE, _SINGULAR_ABOVE_TOL = 1e-6, 100.0

# From so many equations on, and for so few right-hand sides, conjugate gradients are tried before the factorization.
_ITERATED_FROM, _ITERATED_COLUMNS = 300, 2

# The relative residual that they aim at, and that is accepted.
_ROUNDING, _ITERATED_TO = 1e-15, 1e-12

# They leave out entries below the first, as a part of the smallest marginal, and want groups to exchange more than the second.
_LOST, _LINK = 1e-18, 1e-5


class Options(NamedTuple):
    """How the potentials are found; ``balanced`` is the relative difference of the masses that counts as rounding."""

    method: Method
    tol: float
    max_iter: int | None
    on_failure: OnFailure
    balanced: float


def plan_of(potentials: Tensor, cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
    """The plan ``(*batch, n, m)``; zero where a marginal is, and below e^FLOOR.

    Args:
        potentials: (f, g), ``(*batch, n + m)``.
        cost: ``(*batch, n, m)``.
        a: ``(*batch, n)``.
        b: ``(*batch, m)``.
        epsilon: ``(*batch,)``.
    """
    phi, gamma = _scaled(potentials, a, b, epsilon)
    exponent = cost / -epsilon[..., None, None]
    if in_a_transform(exponent, potentials) or exponent.shape[:-2] != potentials.shape[:-1]:
        exponent = exponent + phi.unsqueeze(-1) + gamma.unsqueeze(-2)
    else:
        # The time for a large plan goes into memory that is touched for the first time.
        exponent = exponent.add_(phi.unsqueeze(-1)).add_(gamma.unsqueeze(-2))
        if exponent.numel() and bool(exponent.detach().amin() > FLOOR):
            return exponent.exp_()
    # Thresholds, whose derivatives cost less than those of clamp and where.
    return torch.threshold(torch.threshold(exponent, FLOOR, FLOOR).exp_(), _LEAST, 0.0)


def _plan_on_the_spot(potentials: Tensor, cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
    """The same on plain tensors, without copies."""
    phi, gamma = _scaled(potentials, a, b, epsilon)
    exponent = (cost / -epsilon[..., None, None]).add_(phi.unsqueeze(-1)).add_(gamma.unsqueeze(-2))
    return torch.threshold_(exponent.clamp_(min=FLOOR).exp_(), _LEAST, 0.0)


def _scaled(potentials: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """f/ε and g/ε, −inf where a marginal is zero."""
    f, g = (potentials / epsilon.unsqueeze(-1)).split([a.shape[-1], b.shape[-1]], -1)
    return torch.where(a > 0, f, -torch.inf), torch.where(b > 0, g, -torch.inf)


class Marginals(BroadcastingProblem):
    """F(f, g; C, a, b, ε, usable), where ``usable`` says which elements are finite. Potentials of zero marginals are held at zero."""

    core_ndims = (2, 1, 1, 0, 0)
    inadmissible = "a and b must have the same total mass"

    def __init__(self, batch_ndim: int, options: Options) -> None:
        super().__init__(batch_ndim, residual=self.equations, on_failure=options.on_failure)
        self.options = options
        self._found: tuple[Tensor, Tensor] | None = None

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """The potentials, status, marginal error and iterations of every element."""
        batch, (n, m) = x0.shape[:-1], theta[0].shape[-2:]
        if 0 in batch:
            status = torch.zeros(batch, dtype=torch.int64, device=x0.device)
            return x0.clone(), status, x0.new_zeros(batch), status.clone()
        C, a, b, epsilon, *_, usable = flat = flattened(theta, batch, self.core_ndims)
        lacking = torch.stack([self.surplus(a.sum(-1), b.sum(-1)), -a.amin(-1), -b.amin(-1)]).amax(0)
        feasible = lacking <= 0
        a, b = self.balanced(a.clamp(min=0), b.clamp(min=0))
        index = (usable & (a.sum(-1) > 0) & (b.sum(-1) > 0)).nonzero().squeeze(-1)
        x = x0.new_zeros(C.shape[0], n + m)
        iterations = torch.zeros(C.shape[0], dtype=torch.int64, device=x0.device)
        largest = torch.maximum(C.amax((-1, -2)), -C.amin((-1, -2)))
        noise = _NOISE * torch.finfo(C.dtype).eps / epsilon
        tol = (noise * torch.maximum(largest, self.height(a, b, flat))).clamp(min=self.options.tol)
        if index.numel():
            flipped = m > n
            part = Scaled(C / epsilon[:, None, None], a, b, self.slack(flat)).take(index)
            if flipped:
                part = Scaled(part.X.mT.contiguous(), part.b, part.a, None if part.slack is None else part.slack.flip(-1))
            # What is asked of the last iterate leaves a margin for what the plan loses when it is computed again.
            found = find_potentials(part, tol[index] * part.a.sum(-1) / 2, method=self.options.method, max_iter=self.options.max_iter)
            sides = (found.gamma, found.phi) if flipped else (found.phi, found.gamma)
            x[index] = torch.cat(sides, -1) * epsilon[index, None]
            iterations[index] = found.iterations
        finite = torch.isfinite(x)
        positive = torch.cat([a, b], -1) > 0
        x = torch.where(finite & positive, x, 0)
        plan = _plan_on_the_spot(x, C, a, b, epsilon)
        self._found = x, plan
        rows, columns = self.wanted(x, a, b, flat)
        error = marginal_error(plan, rows, columns)
        status = torch.where((error <= tol * rows.sum(-1)) & (finite | ~positive).all(-1), int(Status.SOLVED), int(Status.MAX_ITER))
        status = torch.where(feasible, status, int(Status.PRIMAL_INFEASIBLE))
        status = torch.where(usable, status, int(Status.NUMERICAL_ERROR))
        error = torch.where(feasible, error, lacking)
        solution = Solution(x, status, torch.where(usable, error, torch.nan), iterations)
        solution = Solution(*(part.reshape((*batch, *part.shape[1:])) for part in solution))
        report_failures(solution, what_failed("sinkhorn", status, flat[1], flat[2], wanted=self.inadmissible), self.on_failure)
        return tuple(solution)

    @staticmethod
    def equations(x: Tensor, C: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, *_: Tensor) -> Tensor:
        """F."""
        P = plan_of(x, C, a, b, epsilon)
        f, g = x.split(list(C.shape[-2:]), -1)
        return torch.cat([torch.where(a > 0, P.sum(-1) - a, f), torch.where(b > 0, P.sum(-2) - b, g)], -1)

    def surplus(self, left: Tensor, right: Tensor) -> Tensor:
        """By how much masses differ more than rounding explains: a positive number if there is no plan."""
        return (left - right).abs() - self.options.balanced * left

    def balanced(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Marginals of equal masses to the last digit: what they differ by is rounding, or a failure, and no plan meets both."""
        return a, b * (a.sum(-1) / b.sum(-1).clamp(min=torch.finfo(b.dtype).tiny)).unsqueeze(-1)

    def slack(self, flat: Sequence[Tensor]) -> Tensor | None:
        """What :class:`~difflayers.transport.sweeps.Scaled` wants of θ, which is flat."""
        return None

    def height(self, a: Tensor, b: Tensor, flat: Sequence[Tensor]) -> Tensor:
        """How large the potentials are beyond the largest cost, at least."""
        return torch.zeros_like(flat[3])

    def wanted(self, x: Tensor, a: Tensor, b: Tensor, flat: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The row and column sums that a plan with the potentials x must have."""
        return a, b

    def factorized(self, P: Tensor, x: Tensor, flat: Sequence[Tensor]) -> Factor:
        """The Jacobian at flat points, whose plans are P."""
        return Factor(P, *flat[1:4])

    def operator(self, point: Sequence[Any], transpose: bool) -> Any:
        """The Jacobian of F, equal to its transpose at every point."""
        x, C, a, b, epsilon, *_ = point
        P, scale = plan_of(x, C, a, b, epsilon), epsilon.unsqueeze(-1)
        sums, held = self.diagonal(P, point), torch.cat([a > 0, b > 0], -1)
        sizes = list(C.shape[-2:])

        def apply(u: Tensor) -> Tensor:
            left, right = u.split(sizes, -1)
            crossed = torch.cat([(P @ right.unsqueeze(-1)).squeeze(-1), (left.unsqueeze(-2) @ P).squeeze(-2)], -1)
            return torch.where(held, (sums * u + crossed) / scale, u)

        return apply

    def diagonal(self, P: Tensor, point: Sequence[Any]) -> Tensor:
        """The diagonal of the Jacobian times ε, ``(*batch, n + m)``."""
        return torch.cat([P.sum(-1), P.sum(-2)], -1)

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        """Solve by elimination of the longer side, and a Cholesky factor of what is left."""
        x, *theta = point
        batch, (n, m) = x.shape[:-1], theta[0].shape[-2:]
        status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
        if not bool(rhs.any()):
            return Solution(torch.zeros_like(rhs), status, rhs.new_zeros(rhs.shape[:-1]), status)
        if self._factor is None:
            points = flattened(theta, batch, self.core_ndims)
            self._factor = self.factorized(self._flat_plan(x, theta), x.reshape(-1, n + m), points)
        flat = rhs.reshape(rhs.shape[0] if columns else 1, -1, n + m).permute(1, 2, 0)
        u, residual = self._factor.solve(flat)
        residual = residual.mT.reshape(rhs.shape[:-1])
        limit = max(_SINGULAR_ABOVE, _SINGULAR_ABOVE_TOL * self.options.tol)
        status = (residual > limit) * int(Status.SINGULAR)
        return Solution(u.permute(2, 0, 1).reshape(rhs.shape), status, residual, torch.zeros_like(status))

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        """(∂F/∂θ)ᵀ u in closed form."""
        C, a, b, epsilon, _ = theta
        sizes = list(C.shape[-2:])
        left, right = u.split(sizes, -1)
        f, g = x.split(sizes, -1)
        weighted = C
        if 0 in which or 3 in which:
            rows, columns = (-u / epsilon.unsqueeze(-1)).split(sizes, -1)
            weighted = rows.unsqueeze(-1) + columns.unsqueeze(-2)
            if torch.is_grad_enabled() or in_a_transform(weighted):
                weighted = weighted * plan_of(x, C, a, b, epsilon)
            else:
                weighted = weighted.mul_(self._flat_plan(x, theta).reshape(weighted.shape))
        closed = (
            lambda: weighted,
            lambda: torch.where(a > 0, -left, 0),
            lambda: torch.where(b > 0, -right, 0),
            lambda: (weighted * (f.unsqueeze(-1) + g.unsqueeze(-2) - C)).sum((-1, -2)) / epsilon,
        )
        return [closed[i]().sum_to_size(theta[i].shape) for i in which]

    def _flat_plan(self, x: Tensor, theta: Sequence[Any]) -> Tensor:
        """The plan ``(N, n, m)`` on plain tensors: that of :meth:`find`, if these are its potentials."""
        x, batch = x.reshape(-1, x.shape[-1]), x.shape[:-1]
        if self._found is None or not torch.equal(self._found[0], x):
            self._found = x, _plan_on_the_spot(x, *flattened(theta[:4], batch, self.core_ndims[:4]))
        return self._found[1]

    def deeper(self, size: int) -> Marginals:
        """The same problem with one more leading dimension."""
        return type(self)(self.batch_ndim + 1, self.options)


class Factor:
    """The Jacobian of F for plans P ``(N, n, m)``, factorized.

    A subclass that adds to its diagonal sets ``excess`` ``(N, short side)``, what that adds to the diagonal of the Laplacian.
    """

    excess: Tensor | None = None

    def __init__(self, P: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> None:
        self.P, self.epsilon = P, epsilon[:, None, None]
        self.flipped = P.shape[-1] > P.shape[-2]
        if self.flipped:
            self.P, a, b = self.P.mT, b, a
        self.rows, self.columns = self.P.sum(-1, keepdim=True), self.P.sum(-2).unsqueeze(-1)
        self.held = (a > 0).unsqueeze(-1), (b > 0).unsqueeze(-1)
        self.inverse = torch.where(self.rows > 0, 1 / self.rows, 0)
        self.laplacian: Laplacian | None = None
        self._graphs: dict[int, Kept | None] = {}

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """The solution of columns ``(N, n + m, k)`` and its relative residual ``(N, k)``."""
        sides = rhs.split([self.rows.shape[-2], self.columns.shape[-2]][:: -1 if self.flipped else 1], -2)
        left, right = sides[::-1] if self.flipped else sides
        long, short = torch.where(self.held[0], self.epsilon * left, 0), torch.where(self.held[1], self.epsilon * right, 0)
        scale = long.abs().sum(-2) + short.abs().sum(-2)
        short = short - self.P.mT @ (self.inverse * long)
        if self.excess is None:
            short = self._consistent(short)
        u, residual = self._solve_short(short)
        v = self.inverse * (long - self.P @ u)
        if self.excess is None:
            shift = self._exchanged(v, u)
            v, u = v - shift, u + shift
        v, u = torch.where(self.held[0], v, left), torch.where(self.held[1], u, right)
        return torch.cat((u, v) if self.flipped else (v, u), -2), residual / torch.where(scale > 0, scale, 1)

    def _consistent(self, short: Tensor) -> Tensor:
        # The equations are consistent if their sums agree. What a tangent of the marginals changes in the mass of one side only, and
        # rounding, is taken off in proportion to the marginal.
        mass = self.columns.sum(-2, keepdim=True)
        return short - self.columns / torch.where(mass > 0, mass, 1) * short.sum(-2, keepdim=True)

    def _exchanged(self, v: Tensor, u: Tensor) -> Tensor:
        """The constant that the two sides could exchange, chosen as it is for the potentials."""
        mass = self.columns.sum(-2, keepdim=True)
        return ((self.rows * v).sum(-2, keepdim=True) - (self.columns * u).sum(-2, keepdim=True)) / torch.where(mass > 0, 2 * mass, 1)

    def _solve_short(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """The solution of the Laplacian's system, columns ``(N, m, k)``, and the 1-norm of its residual ``(N, k)``."""
        if self.laplacian is None:
            if rhs.shape[-2] >= _ITERATED_FROM and rhs.shape[-1] <= _ITERATED_COLUMNS:
                found = [self._iterate(index, part) for index, part in enumerate(rhs)]
                solved = [each for each in found if each is not None]
                if len(solved) == len(found):
                    solutions, residuals = zip(*solved, strict=True)
                    return torch.stack(solutions), torch.stack(residuals)
            shift = torch.where(self.columns > 0, _SEPARATE * self.columns, 1).squeeze(-1)
            self.laplacian = Laplacian(self.P * self.inverse.sqrt(), shift, self.excess)
        return self.laplacian.refined(rhs)

    def _iterate(self, index: int, rhs: Tensor) -> tuple[Tensor, Tensor] | None:
        """The same for one plan and columns ``(m, k)`` by conjugate gradients, or None where they are not to be trusted."""
        if index not in self._graphs:
            rows, columns = self.rows[index, :, 0], self.columns[index, :, 0]
            least = _LOST * min(float(torch.where(part > 0, part, torch.inf).min()) for part in (rows, columns))
            plan = Kept(self.P[index], least)
            self._graphs[index] = plan if _is_connected(plan, rows, columns) else None
        plan = self._graphs[index]
        if plan is None:
            return None
        columns, inverse = self.columns[index, :, 0], self.inverse[index, :, 0]
        diagonal = torch.where(columns > 0, columns, 1)
        scale = 1 / (diagonal - plan.squares_transposed(inverse)).clamp(min=torch.finfo(rhs.dtype).eps * diagonal)

        def product(u: Tensor) -> Tensor:
            return diagonal * u - plan.transposed(inverse * plan.times(u))

        size = rhs.abs().sum(0)
        found = [
            conjugate_gradients(product, scale, each, _ROUNDING * float(norm), plan.limit) for each, norm in zip(rhs.mT, size, strict=True)
        ]
        solution = torch.stack([x for x, _ in found], -1)
        residual = torch.stack([(product(x) - each).abs().sum() for x, each in zip(solution.mT, rhs.mT, strict=True)])
        return (solution, residual) if bool((residual <= _ITERATED_TO * size).all()) else None


def _is_connected(plan: Kept, rows: Tensor, columns: Tensor) -> bool:
    """Whether every row and column exchanges more than :data:`_LINK` of its mass with those that hang together with the heaviest column.

    Conjugate gradients do not see what hardly exchanges mass, though a derivative may depend on it.
    """
    reached = torch.zeros_like(columns)
    reached[columns.argmax()] = 1
    before = 0.0
    while float(reached.sum()) > before:
        before = float(reached.sum())
        across = (plan.times(reached) > _LINK * rows).to(rows.dtype)
        reached = torch.maximum(reached, (plan.transposed(across) > _LINK * columns).to(rows.dtype))
    return bool(((reached > 0) | (columns == 0)).all() & ((across > 0) | (rows == 0)).all())


class DualValue(HeldArgument, ExplicitProblem):
    """v − L(C, a, b, ε, potentials) = 0; L is the Lagrangian, stationary in the potentials, which therefore receive no cotangent."""

    core_ndims = (2, 1, 1, 0, 1)

    def __init__(self, batch_ndim: int) -> None:
        super().__init__(batch_ndim, residual=self.lagrangian_error)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """⟨a, f⟩ + ⟨b, g⟩."""
        C, a, b, _, potentials = theta
        f, g = potentials.split(list(C.shape[-2:]), -1)
        return (((a * f).sum(-1) + (b * g).sum(-1)).unsqueeze(-1).expand(x0.shape).clone(),)

    def deeper(self, size: int) -> DualValue:
        """The same problem with one more leading dimension."""
        return type(self)(self.batch_ndim + 1)

    @staticmethod
    def lagrangian_error(v: Tensor, C: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, *rest: Tensor) -> Tensor:
        """v − L."""
        (potentials,) = rest
        P = plan_of(potentials, C, a, b, epsilon)
        f, g = potentials.split(list(C.shape[-2:]), -1)
        mass = (a.sum(-1) + b.sum(-1)) / 2
        return v - ((a * f).sum(-1) + (b * g).sum(-1) + epsilon * (mass - P.sum((-1, -2)))).unsqueeze(-1)
