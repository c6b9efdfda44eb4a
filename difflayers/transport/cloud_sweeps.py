r"""Sinkhorn's sweeps between two point clouds whose cost matrix is computed in blocks, accelerated, on plain tensors.

One pass over the blocks evaluates the kernel once and makes a whole sweep (in units of ε): with the columns' potentials γ it gives those
of the rows, :math:`φ_i = \log a_i - \log \sum_j e^{γ_j - X_{ij}}`, and the column sums c of the plan that meets the rows. The sweep is
:math:`γ \mapsto γ + \log b - \log c`, the error :math:`\|b - c\|_1`, and the semi-dual :math:`⟨a, φ⟩ + ⟨b, γ⟩` comes for free.

Anderson's method combines the last sweeps into the next γ: near the solution a Krylov method on the Laplacian behind the
sweeps, whose number of steps grows with the square root of what plain sweeps take. A step after which the semi-dual is worse
is taken back. ε falls in steps, as in :mod:`~difflayers.transport.potentials`. A cloud beside itself has φ = γ, and the averaged iteration
:math:`φ \mapsto \tfrac12 (φ + T φ)` converges with the factor ½ at every ε.

References: Cuturi, Sinkhorn distances, NeurIPS 2013, arXiv:1306.0895; Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM
Journal on Numerical Analysis 49 (2011); Feydy et al., Interpolating between optimal transport and MMD using Sinkhorn divergences, AISTATS
2019, arXiv:1810.08278.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .sweeps import FLOOR

__all__ = ["Cloud", "PairCost", "find_cloud_potentials"]

# (*batch, n, d), (*batch, m, d) -> (*batch, n, m)
PairCost = Callable[[Tensor, Tensor], Tensor]

# The first ε as a fraction of the cost's range, what the next one is of that, the error to reach before, and the most sweeps there.
_FIRST, _FACTOR, _NEAR, _NEAR_SWEEPS = 0.05, 0.25, 3e-2, 30

# Sweeps that Anderson's method combines, and the relative size of singular values that it ignores.
_MEMORY, _REGULARIZATION = 30, 1e-10

_LEAST = 1e-300


class Cloud:
    """exp(φ ⊕ γ − C/ε) of one pair of clouds, a block of rows at a time.

    Args:
        x: ``(n, d)``.
        y: ``(m, d)``.
        epsilon: the temperature.
        cost: None for squared distances.
        block: rows at a time.
    """

    def __init__(self, x: Tensor, y: Tensor, epsilon: float, cost: PairCost | None, block: int) -> None:
        self.x, self.y, self.epsilon, self.cost, self.block = x, y, epsilon, cost, block
        if cost is None:
            center = y.mean(0)
            self.x, self.y = x - center, y - center

    def at(self, epsilon: float) -> Cloud:
        """The same clouds at another temperature."""
        return Cloud(self.x, self.y, epsilon, self.cost, self.block)

    def exponents(self, phi: Tensor | None, gamma: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of φ ⊕ γ − C/ε, each in the place of the one before."""
        n, m = len(self.x), len(self.y)
        buffer = self.x.new_empty(min(self.block, n), m)
        if self.cost is None:
            # One product gives all three terms.
            heights = (self.x * self.x).sum(-1) / -self.epsilon
            left = torch.cat([self.x * (2 / self.epsilon), (heights if phi is None else heights + phi).unsqueeze(-1)], -1)
            right = torch.cat([self.y, torch.ones_like(self.y[:, :1])], -1).T.contiguous()
            bias = gamma - (self.y * self.y).sum(-1) / self.epsilon
        for begin in range(0, n, self.block):
            place = slice(begin, min(begin + self.block, n))
            Z = buffer[: place.stop - begin]
            if self.cost is None:
                torch.addmm(bias, left[place], right, out=Z)
            else:
                torch.div(self.cost(self.x[place], self.y), -self.epsilon, out=Z)
                Z += gamma
                if phi is not None:
                    Z += phi[place].unsqueeze(-1)
            yield place, Z

    def scaled_cost(self) -> Tensor:
        """C/ε, all of it."""
        return torch.cat([-Z for _, Z in self.exponents(None, self.y.new_zeros(len(self.y)))])

    def kernel(self, phi: Tensor, gamma: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of exp(φ ⊕ γ − C/ε)."""
        for place, Z in self.exponents(phi, gamma):
            yield place, Z.clamp_(min=FLOOR).exp_()

    def sweep(self, log_a: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """φ, and the column sums of the plan that meets the rows."""
        phi, columns = torch.empty_like(log_a), torch.zeros_like(gamma)
        for place, Z in self.exponents(None, gamma):
            top = Z.amax(-1, keepdim=True)
            K = Z.sub_(top).clamp_(min=FLOOR).exp_()
            sums = K.sum(-1)
            phi[place] = log_a[place] - sums.log() - top.squeeze(-1)
            columns.addmv_(K.T, log_a[place].exp() / sums)
        return phi, columns

    def sums(self, phi: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column sums."""
        rows, columns = torch.empty_like(phi), torch.zeros_like(gamma)
        for place, K in self.kernel(phi, gamma):
            rows[place] = K.sum(-1)
            columns += K.sum(0)
        return rows, columns

    def largest(self) -> tuple[float, float]:
        """The largest entry of C, and the smallest."""
        blocks = [torch.stack(torch.aminmax(Z)) for _, Z in self.exponents(None, self.y.new_zeros(len(self.y)))]
        low, high = torch.stack(blocks).unbind(-1)
        return -float(low.min()) * self.epsilon, -float(high.max()) * self.epsilon


class _Step(NamedTuple):
    """The residual of the iteration, its error, a merit that grows towards the solution, and both potentials."""

    residual: Tensor
    error: float
    merit: float
    potentials: tuple[Tensor, Tensor]


def find_cloud_potentials(
    cloud: Cloud, a: Tensor, b: Tensor, tol: float, *, max_iter: int, symmetric: bool, spread: float
) -> tuple[Tensor, Tensor, int]:
    """The potentials in units of ε, and the sweeps that took; whether the error is within ``tol`` is for the caller to see.

    Args:
        cloud: at the temperature that is wanted.
        a: ``(n,)``, nonnegative.
        b: ``(m,)``, of the same mass, which is positive.
        tol: the marginal error (1-norm) to reach.
        max_iter: most sweeps at ε itself.
        symmetric: whether both clouds, with their masses, are the same.
        spread: range of the cost.
    """
    log_a, log_b = a.log(), b.log()

    def step_of(cloud: Cloud) -> Callable[[Tensor], _Step]:
        def step(z: Tensor) -> _Step:
            gamma = torch.where(b > 0, z, -torch.inf)
            phi, columns = cloud.sweep(log_a, gamma)
            residual = torch.where(b > 0, log_b - columns.clamp(min=_LEAST).log(), 0)
            merit = float(torch.where(a > 0, a * phi, 0).sum() + torch.where(b > 0, b * gamma, 0).sum())
            return _Step(residual, float((b - columns).abs().sum()), merit, (phi, gamma))

        def symmetric_step(z: Tensor) -> _Step:
            phi = torch.where(a > 0, z, -torch.inf)
            change = torch.where(a > 0, cloud.sweep(log_a, phi)[0] - phi, 0)
            sums = a * torch.exp(-change)
            merit = float(2 * torch.where(a > 0, a * phi, 0).sum() - sums.sum())
            return _Step(change / 2, float((sums - a).abs().sum()), merit, (phi, phi))

        return symmetric_step if symmetric else step

    levels = max(math.ceil(math.log(spread * _FIRST / cloud.epsilon) / -math.log(_FACTOR)), 0) if spread > 0 else 0
    z, used = torch.zeros_like(b), 0
    for level in range(levels, -1, -1):
        epsilon = cloud.epsilon * _FACTOR**-level
        goal, most = (_NEAR * float(a.sum()), _NEAR_SWEEPS) if level else (tol, max_iter)
        step = step_of(cloud.at(epsilon) if level else cloud)
        z, found, count = _accelerated(step, z / epsilon, b.sqrt(), goal, most)
        z, used = z * epsilon, used + count
    return (*found.potentials, used)


def _accelerated(step: Callable[[Tensor], _Step], z: Tensor, weights: Tensor, tol: float, max_iter: int) -> tuple[Tensor, _Step, int]:
    """Anderson's method, each entry weighted: the last point, its step, and how many were made."""
    now = step(z)
    best = z, now
    points, residuals, repeated = [z], [now.residual], 0
    for count in range(1, max_iter):
        if now.error <= tol:
            return z, now, count + repeated
        z = z + now.residual
        if len(points) > 1:
            steps, changes = _differences(points), _differences(residuals)
            weighted = weights.unsqueeze(-1) * changes
            # The normal equations of a least-squares problem in its singular vectors; small ones are noise.
            values, vectors = torch.linalg.eigh(weighted.T @ weighted)
            useful = values > _REGULARIZATION * values[-1]
            inverse = torch.where(useful, 1 / torch.where(useful, values, 1), 0)
            mixed = vectors @ (inverse * (vectors.T @ (weighted.T @ (weights * now.residual))))
            z = z - (steps + changes) @ mixed
        last, now = now, step(z)
        if not (now.merit >= last.merit or now.error <= last.error):
            # Back to the last good point, and from there without a memory.
            z = points[-1] + residuals[-1]
            points, residuals, now = [], [], step(z)
            repeated += 1
        points, residuals = [*points, z][-_MEMORY - 1 :], [*residuals, now.residual][-_MEMORY - 1 :]
        if not now.error >= best[1].error:
            best = z, now
    return *best, max_iter + repeated


def _differences(vectors: list[Tensor]) -> Tensor:
    stacked = torch.stack(vectors, -1)
    return stacked[:, 1:] - stacked[:, :-1]
