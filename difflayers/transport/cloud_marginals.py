r"""The marginal equations between two point clouds, evaluated in blocks, as the root problem that the core differentiates.

They are those of :mod:`~difflayers.transport.marginals` with :math:`C_{ij} = c(x_i, y_j)`. Their sums, and all derivatives of these, are
evaluated in blocks (:mod:`~difflayers.transport.blocks`). A linear system is reduced to the Laplacian on the columns and solved by
conjugate gradients, one pass over the blocks for a product. Where one block holds the whole matrix, the dense methods take over: Newton's
method and a Cholesky factor do not mind how small ε is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..implicit.broadcasting import BroadcastingProblem
from ..solution import Solution, Status, report_failures
from ..solvers.linear import cg
from .arguments import flattened, what_failed
from .blocks import blockwise
from .cloud_sweeps import Cloud, PairCost, find_cloud_potentials
from .costs import squared_distances
from .marginals import DualValue, Factor, Marginals, Options
from .potentials import find_potentials
from .sweeps import FLOOR, Scaled

__all__ = ["CloudDualValue", "CloudMarginals", "Means"]

_SWEEPS, _ITERATIONS = 2000, 3000

# The rounding of the exponents, in units of the last place of the largest one.
_NOISE = 8.0

_SINGULAR_ABOVE, _SINGULAR_ABOVE_TOL = 1e-6, 100.0

_LEAST = 1e-130


class CloudMarginals(Marginals):
    """F(f, g; x, a, b, ε, y, usable): the marginal equations of a plan that is computed in blocks."""

    core_ndims = (2, 1, 1, 0, 2, 0)

    def __init__(self, batch_ndim: int, options: Options, cost: PairCost | None, block: int) -> None:
        BroadcastingProblem.__init__(self, batch_ndim, residual=_Equations(cost, block), on_failure=options.on_failure)
        self.options, self.cost, self.block = options, cost, block

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """The potentials, status, marginal error and iterations of every element, one after the other."""
        batch = x0.shape[:-1]
        count, flat = math.prod(batch), flattened(theta, batch, self.core_ndims)
        parts = [self._find_one(*(leaf[i] for leaf in flat)) for i in range(count)]
        z = torch.stack([part[0] for part in parts]) if parts else x0
        numbers = torch.tensor([part[1:] for part in parts], dtype=torch.float64, device=x0.device).reshape(count, 3)
        status, error, iterations = numbers[:, 0].to(torch.int64), numbers[:, 1], numbers[:, 2].to(torch.int64)
        solution = Solution(z.reshape(x0.shape).clone(), *(part.reshape(batch) for part in (status, error, iterations)))
        report_failures(solution, what_failed("sinkhorn_points", status, flat[1], flat[2]), self.on_failure)
        return tuple(solution)

    def _find_one(self, x: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, y: Tensor, usable: Tensor) -> tuple[Tensor, int, float, int]:
        nothing = a.new_zeros(len(a) + len(b))
        if not bool(usable):
            return nothing, int(Status.NUMERICAL_ERROR), math.nan, 0
        lacking = float(torch.stack([self.surplus(a.sum(-1), b.sum(-1)), -a.min(), -b.min()]).max())
        a, b = self.balanced(a.clamp(min=0), b.clamp(min=0))
        mass = float(a.sum())
        if not mass > 0 or not float(b.sum()) > 0:
            return nothing, int(Status.PRIMAL_INFEASIBLE if lacking > 0 else Status.SOLVED), max(lacking, 0.0), 0
        cloud = Cloud(x, y, float(epsilon), self.cost, self.block)
        high, low = cloud.largest()
        tol = max(self.options.tol, _NOISE * torch.finfo(a.dtype).eps * max(high, -low) / float(epsilon)) * mass
        symmetric = x.shape == y.shape and torch.equal(x, y) and torch.equal(a, b)
        if self.block >= len(x) and not symmetric:
            phi, gamma, used = self._find_whole(cloud, a, b, tol / 2)
        else:
            most, spread = self.options.max_iter or _SWEEPS, high - low
            phi, gamma, used = find_cloud_potentials(cloud, a, b, tol / 2, max_iter=most, symmetric=symmetric, spread=spread)
        rows, columns = cloud.sums(phi, gamma)
        # With the right mass of the plan, the error of ⟨a, f⟩ + ⟨b, g⟩ is of second order. Sweeps end with it, averaged ones do not.
        ratio = mass / rows.sum()
        rows, columns, phi, gamma = ratio * rows, ratio * columns, phi + ratio.log() / 2, gamma + ratio.log() / 2
        error = max(float((rows - a).abs().sum()), float((columns - b).abs().sum()))
        z = torch.where(torch.cat([a, b]) > 0, torch.cat([phi, gamma]) * epsilon, 0)
        finite = bool(torch.isfinite(z).all())
        status = Status.SOLVED if error <= tol and finite else Status.MAX_ITER
        if lacking > 0:
            status, error = Status.PRIMAL_INFEASIBLE, lacking
        return (z if finite else nothing), int(status), error, used

    def _find_whole(self, cloud: Cloud, a: Tensor, b: Tensor, tol: float) -> tuple[Tensor, Tensor, int]:
        """The same by the dense methods, Newton's among them, where one block holds the whole matrix."""
        problem = Scaled(cloud.scaled_cost(), a, b)
        flipped = len(b) > len(a)
        problem = Scaled(problem.X.mT.contiguous(), b, a) if flipped else problem
        problem = Scaled(*(part.unsqueeze(0) for part in problem[:3]))
        found = find_potentials(problem, a.new_full((1,), tol), method="auto", max_iter=self.options.max_iter)
        sides = (found.gamma[0], found.phi[0]) if flipped else (found.phi[0], found.gamma[0])
        return (*sides, int(found.iterations))

    def operator(self, point: Sequence[Any], transpose: bool) -> Any:
        """The Jacobian of F, equal to its transpose at every point."""
        z, x, a, b, epsilon, y, _ = point
        held, scale = torch.cat([a > 0, b > 0], -1), epsilon.unsqueeze(-1)
        phi, gamma = _scaled(z, a, b, epsilon)
        outputs = [1], [(gamma.shape[-2], 1)]

        def apply(u: Tensor) -> Tensor:
            left, right = u.split([a.shape[-1], b.shape[-1]], -1)
            others = [y, gamma, epsilon[..., None, None], right.unsqueeze(-1)]
            (rows,), (columns,) = blockwise(_Products(self.cost), [x, phi, left.unsqueeze(-1)], others, outputs, self.block)
            return torch.where(held, torch.cat([rows.squeeze(-1), columns.squeeze(-1)], -1) / scale, u)

        return apply

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        """Conjugate gradients with the Laplacian on the columns, element by element."""
        batch = point[0].shape[:-1]
        count, size = math.prod(batch), rhs.shape[-1]
        if self._factor is None:
            leaves = flattened(point, batch, (1, *self.core_ndims))
            kind = _WholeFactor if self.block >= leaves[1].shape[-2] else _CloudFactor
            self._factor = [kind(*(leaf[i] for leaf in leaves), self.cost, self.block) for i in range(count)]
        flat = rhs.reshape(rhs.shape[0] if columns else 1, count, size)
        u, residual = torch.zeros_like(flat), flat.new_zeros(flat.shape[:-1])
        for i, factor in enumerate(self._factor):
            if bool(flat[:, i].any()):
                u[:, i], residual[:, i] = factor.solve(flat[:, i])
        residual = residual.reshape(rhs.shape[:-1])
        status = (residual > max(_SINGULAR_ABOVE, _SINGULAR_ABOVE_TOL * self.options.tol)) * int(Status.SINGULAR)
        return Solution(u.reshape(rhs.shape), status, residual, torch.zeros_like(status))

    def pullback(self, x: Tensor, theta: Sequence[Any], which: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        """(∂F/∂θ)ᵀ u, in blocks."""
        return BroadcastingProblem.pullback(self, x, theta, which, u)

    def deeper(self, size: int) -> CloudMarginals:
        """The same problem with one more leading dimension."""
        return CloudMarginals(self.batch_ndim + 1, self.options, self.cost, max(self.block // max(size, 1), 1))


class _CloudFactor:
    """The Jacobian of F at one point: what products with the Laplacian need."""

    def __init__(
        self, z: Tensor, x: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, y: Tensor, usable: Tensor, cost: PairCost | None, block: int
    ) -> None:
        phi, gamma = (part.squeeze(-1) for part in _scaled(z, a, b, epsilon))
        self.cloud, self.phi, self.gamma, self.epsilon = Cloud(x, y, float(epsilon), cost, block), phi, gamma, epsilon
        self.held = torch.cat([a, b]) > 0
        self.rows, self.columns = (torch.where(part > 0, sums, 0) for part, sums in zip((a, b), self.cloud.sums(phi, gamma), strict=True))
        self.inverse = torch.where(self.rows > 0, 1 / self.rows, 0)
        peaks = torch.zeros_like(self.columns)
        for place, K in self.cloud.kernel(phi, gamma):
            peaks.addmv_(K.square_().T, self.inverse[place])
        diagonal = self.columns - peaks
        usable_entries = diagonal > torch.finfo(b.dtype).eps * self.columns
        self.scale = torch.where(usable_entries, 1 / torch.where(usable_entries, diagonal, 1), 1)

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """The solution of rows ``(k, n + m)`` and its relative residual ``(k,)``."""
        n, m = len(self.rows), len(self.columns)
        left, right = torch.where(self.held, self.epsilon * rhs, 0).split([n, m], -1)
        size = left.abs().sum(-1) + right.abs().sum(-1)
        short = right - self._transposed(self.inverse * left)
        # Consistent, and with the constant, as in the dense problem.
        mass = self.columns.sum()
        short = short - self.columns / mass * short.sum(-1, keepdim=True)
        short = torch.where(self.columns > 0, short, 0)
        found = cg(self._laplacian, short, preconditioner=lambda r: self.scale * r, max_iter=_ITERATIONS)
        u = found.x
        v = self.inverse * (left - self._times(u))
        shift = ((self.rows * v).sum(-1, keepdim=True) - (self.columns * u).sum(-1, keepdim=True)) / (2 * mass)
        solution = torch.where(self.held, torch.cat([v - shift, u + shift], -1), rhs)
        return solution, found.residual * torch.linalg.vector_norm(short, dim=-1) / torch.where(size > 0, size, 1)

    def _laplacian(self, u: Tensor) -> Tensor:
        product = self.columns * u
        for place, K in self.cloud.kernel(self.phi, self.gamma):
            product -= (u @ K.T * self.inverse[place]) @ K
        return product

    def _times(self, u: Tensor) -> Tensor:
        return torch.cat([u @ K.T for _, K in self.cloud.kernel(self.phi, self.gamma)], -1)

    def _transposed(self, v: Tensor) -> Tensor:
        product = v.new_zeros(len(v), len(self.columns))
        for place, K in self.cloud.kernel(self.phi, self.gamma):
            product += v[:, place] @ K
        return product


class _WholeFactor:
    """The same by the factor of the dense problem, where one block holds the whole matrix."""

    def __init__(
        self, z: Tensor, x: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, y: Tensor, usable: Tensor, cost: PairCost | None, block: int
    ) -> None:
        phi, gamma = (part.squeeze(-1) for part in _scaled(z, a, b, epsilon))
        P = torch.cat([K.clone() for _, K in Cloud(x, y, float(epsilon), cost, block).kernel(phi, gamma)])
        self.factor = Factor(*(part.unsqueeze(0) for part in (torch.threshold(P, _LEAST, 0.0), a, b, epsilon)))

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """The solution of rows ``(k, n + m)`` and its relative residual ``(k,)``."""
        solution, residual = self.factor.solve(rhs.mT.unsqueeze(0))
        return solution[0].mT, residual[0]


class CloudDualValue(DualValue):
    """v − L(x, a, b, ε, y, potentials) = 0."""

    core_ndims = (2, 1, 1, 0, 2, 1)

    def __init__(self, batch_ndim: int, cost: PairCost | None, block: int) -> None:
        BroadcastingProblem.__init__(self, batch_ndim, residual=_LagrangianError(cost, block))
        self.cost, self.block = cost, block

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        """⟨a, f⟩ + ⟨b, g⟩."""
        _, a, b, _, _, potentials = theta
        f, g = potentials.split([a.shape[-1], b.shape[-1]], -1)
        return (((a * f).sum(-1) + (b * g).sum(-1)).unsqueeze(-1).expand(x0.shape).clone(),)

    def deeper(self, size: int) -> CloudDualValue:
        """The same problem with one more leading dimension."""
        return CloudDualValue(self.batch_ndim + 1, self.cost, max(self.block // max(size, 1), 1))


def _scaled(z: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """f/ε and g/ε as columns, −inf where a mass is zero."""
    f, g = (z / epsilon.unsqueeze(-1)).split([a.shape[-1], b.shape[-1]], -1)
    return torch.where(a > 0, f, -torch.inf).unsqueeze(-1), torch.where(b > 0, g, -torch.inf).unsqueeze(-1)


class _Blocks:
    """A function of blocks of rows."""

    def __init__(self, cost: PairCost | None) -> None:
        self.cost = squared_distances if cost is None else cost

    def plan(self, x: Tensor, phi: Tensor, y: Tensor, gamma: Tensor, epsilon: Tensor) -> Tensor:
        exponent = self.cost(x, y) / -epsilon + phi + gamma.mT
        return torch.threshold(torch.threshold(exponent, FLOOR, FLOOR).exp(), _LEAST, 0.0)


class _Sums(_Blocks):
    """(x, φ), (y, γ, ε): the row and column sums."""

    def __call__(self, rows: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        P = self.plan(*rows, *others)
        return [P.sum(-1, keepdim=True)], [P.sum(-2).unsqueeze(-1)]


class _Total(_Blocks):
    """(x, φ), (y, γ, ε): the mass of the plan."""

    def __call__(self, rows: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [], [self.plan(*rows, *others).sum((-1, -2), keepdim=True)]


class _Products(_Blocks):
    """(x, φ, u), (y, γ, ε, w): (P 1) u + P w and (Pᵀ 1) w + Pᵀ u."""

    def __call__(self, rows: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        (*rows, u), (*others, w) = rows, others
        P = self.plan(*rows, *others)
        return [P.sum(-1, keepdim=True) * u + P @ w], [P.sum(-2).unsqueeze(-1) * w + P.mT @ u]


class Means(_Blocks):
    """(points,), (y, γ, ε): the means of y."""

    def __call__(self, rows: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The means, row by row."""
        y, gamma, epsilon = others
        return [(self.cost(rows[0], y) / -epsilon + gamma.mT).softmax(-1) @ y], []


class _Equations:
    """F of the potentials, made of blocks."""

    def __init__(self, cost: PairCost | None, block: int) -> None:
        self.sums, self.block = _Sums(cost), block

    def __call__(self, z: Tensor, x: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, y: Tensor, _: Tensor) -> Tensor:
        phi, gamma = _scaled(z, a, b, epsilon)
        others = [y, gamma, epsilon[..., None, None]]
        (rows,), (columns,) = blockwise(self.sums, [x, phi], others, ([1], [(b.shape[-1], 1)]), self.block)
        f, g = z.split([a.shape[-1], b.shape[-1]], -1)
        return torch.cat([torch.where(a > 0, rows.squeeze(-1) - a, f), torch.where(b > 0, columns.squeeze(-1) - b, g)], -1)


class _LagrangianError:
    """v − L, made of blocks."""

    def __init__(self, cost: PairCost | None, block: int) -> None:
        self.total, self.block = _Total(cost), block

    def __call__(self, v: Tensor, x: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, y: Tensor, potentials: Tensor) -> Tensor:
        phi, gamma = _scaled(potentials, a, b, epsilon)
        (total,) = blockwise(self.total, [x, phi], [y, gamma, epsilon[..., None, None]], ([], [(1, 1)]), self.block)[1]
        f, g = potentials.split([a.shape[-1], b.shape[-1]], -1)
        mass = (a.sum(-1) + b.sum(-1)) / 2
        return v - ((a * f).sum(-1) + (b * g).sum(-1) + epsilon * (mass - total.squeeze((-1, -2)))).unsqueeze(-1)
