r"""Sinkhorn's sweeps, for a batch of problems that stop one by one.

With potentials in units of ε (φ = f/ε, γ = g/ε, X = C/ε) one sweep meets the rows, then the columns:

.. math:: φ_i = \log a_i - \log \sum_j e^{γ_j - X_{ij}}, \qquad γ_j = \log b_j - \log \sum_i e^{φ_i - X_{ij}} .

After half a sweep in the log domain the kernel :math:`K = e^{φ ⊕ γ - X}` has entries of the size of the marginals, and further sweeps are
products with it, :math:`u = a / (K v)`, :math:`v = b / (K^T u)`: the same iteration without the exponentials. Scalings that have grown
large are absorbed into the potentials, and K is made anew.

Where the marginals may be missed at the price ρ (:mod:`~difflayers.transport.unbalanced`), :math:`a_i e^{-φ_i ε/ρ}` takes the place of
:math:`a_i`. Both updates are then damped: logarithms are divided by 1 + ε/ρ, and distances shrink by that factor, whatever the cost. The
constant that φ and γ exchange, where sweeps are slow at large ρ, is set to its best value now and then.

References: Cuturi, Sinkhorn distances, NeurIPS 2013, arXiv:1306.0895; Schmitzer, Stabilized sparse scaling algorithms for entropy
regularized transport problems, SIAM Journal on Scientific Computing 41 (2019), arXiv:1610.06519; Chizat, Peyré, Schmitzer and Vialard,
Scaling algorithms for unbalanced optimal transport problems, Mathematics of Computation 87 (2018), arXiv:1607.05816; Séjourné, Vialard
and Peyré, Faster unbalanced optimal transport: translation invariant Sinkhorn and 1-D Frank-Wolfe, AISTATS 2022, arXiv:2201.00730.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FLOOR", "STRIDE", "Scaled", "Swept", "log_sums", "sweep", "wanted"]

# exp is many times slower where it underflows, and so are products of numbers next to zero: exponents are cut off here.
FLOOR = -300.0

# Sweeps between two looks at the rate of convergence. With so many entries the error is looked at after each of them.
STRIDE, _LARGE = 10, 100_000

# Scalings beyond e^±_GROWN are absorbed.
_GROWN = 50.0


class Scaled(NamedTuple):
    """Problems in units of ε: X ``(N, n, m)``, and marginals a ``(N, n)`` and b ``(N, m)`` of equal, positive mass.

    With ``slack`` ``(N, 2)``, the ε/ρ of the rows and of the columns, the plan may miss them, and their masses may differ. The plan's own
    mass is then not known beforehand: errors are stated as if it had the mass of a.
    """

    X: Tensor
    a: Tensor
    b: Tensor
    slack: Tensor | None = None

    def take(self, index: Tensor) -> Scaled:
        """The problems of ``index``; all of them are not copied."""
        if index.numel() == self.X.shape[0]:
            return self
        return Scaled(self.X[index], self.a[index], self.b[index], None if self.slack is None else self.slack[index])


class Swept(NamedTuple):
    """Where the sweeps ended.

    Attributes:
        phi: ``(N, n)``.
        gamma: ``(N, m)``; the columns are met.
        error: ``(N,)``, 1-norm of the row error.
        iterations: ``(N,)``, sweeps.
    """

    phi: Tensor
    gamma: Tensor
    error: Tensor
    iterations: Tensor


def log_sums(X: Tensor, potential: Tensor, dim: int) -> Tensor:
    """log Σ exp(potential − X), over the columns (``dim=-1``) or the rows (``dim=-2``).

    Args:
        X: ``(N, n, m)``.
        potential: ``(N, m)`` for sums over the columns, ``(N, n)`` over the rows.
        dim: what is summed over.
    """
    Z = potential.unsqueeze(-3 - dim) - X
    top = Z.amax(dim, keepdim=True)
    return Z.sub_(top).clamp_(min=FLOOR).exp_().sum(dim).log_().add_(top.squeeze(dim))


def sweep(problem: Scaled, gamma: Tensor, tol: Tensor, *, max_iter: int, patience: float) -> Swept:
    """Sweep until the marginals are met.

    Args:
        problem: N problems.
        gamma: ``(N, m)``, where to start.
        tol: ``(N,)``, the row error (1-norm) to reach.
        max_iter: most sweeps.
        patience: give up on an element as soon as its rate of convergence predicts more than so many sweeps to come.
    """
    count = problem.X.shape[0]
    found = Swept(torch.zeros_like(problem.a), gamma.clone(), torch.full_like(tol, torch.inf), torch.zeros_like(tol, dtype=torch.int64))
    index = torch.arange(count, device=gamma.device)
    kernel, left = _Kernel(problem, gamma), problem
    before = found.error
    done = 0
    while index.numel():
        stride = min(1 if left.X[0].numel() >= _LARGE else STRIDE, max_iter - done)
        kernel.sweep(stride)
        done += stride
        error = kernel.row_error()
        target = tol[index]
        stop = ~(error > target) | (done >= max_iter)
        compared = done % STRIDE == 0
        if compared:
            to_come = torch.log(error / target) / torch.log(before / error).clamp(min=1e-300) * STRIDE
            # The first look has nothing to compare with.
            stop = stop | ((to_come > patience) & torch.isfinite(before))
            before = error
        if bool(stop.any()):
            phi, gamma = kernel.potentials()
            for target_part, source in zip(found, (phi, gamma, error, torch.full_like(index, done)), strict=True):
                target_part[index[stop]] = source[stop]
            keep = (~stop).nonzero().squeeze(-1)
            if keep.numel() < index.numel():
                index, left, before = index[keep], left.take(keep), before[keep]
                kernel = kernel.take(keep)
        elif kernel.has_grown():
            kernel = _Kernel(left, kernel.potentials()[1])
    return found


class _Kernel:
    """K = exp(φ ⊕ γ − X), with φ found in the log domain, and the scalings u, v of its rows and columns, as columns ``(N, ., 1)``."""

    def __init__(self, problem: Scaled, gamma: Tensor) -> None:
        X, a, b, slack = problem
        self.alpha: Tensor | None = None if slack is None else slack[:, :1, None]
        self.beta: Tensor | None = None if slack is None else slack[:, 1:, None]
        self.mass = a.sum(-1)
        self.gamma = torch.where(b > 0, gamma, -torch.inf)
        self.phi = (a.log() - log_sums(X, self.gamma, -1)) / _damping(self.alpha)
        self.u = torch.ones_like(a).unsqueeze(-1)
        self._set_kernel(problem)
        if self.has_grown():
            # Columns that the cut exponents have lost are found again in the log domain.
            self.gamma = (b.log() - log_sums(X, self.phi, -2)) / _damping(self.beta)
            self._set_kernel(problem)

    def _set_kernel(self, problem: Scaled) -> None:
        """K, the sums that are wanted of it, and the v that meets its columns."""
        X, a, b, _ = problem
        self.K = self.phi.unsqueeze(-1).sub(X).add_(self.gamma.unsqueeze(-2)).clamp_(min=FLOOR).exp_()
        self.a = wanted(a.unsqueeze(-1), self.phi.unsqueeze(-1), self.alpha)
        self.b = wanted(b.unsqueeze(-1), self.gamma.unsqueeze(-1), self.beta)
        self.v = _damped(self.b / (self.K.mT @ self.u), self.beta)
        self._sums: Tensor | None = None

    def take(self, index: Tensor) -> _Kernel:
        """The kernels of ``index``."""
        part = object.__new__(_Kernel)
        for name, value in vars(self).items():
            setattr(part, name, None if value is None else value[index])
        return part

    def sweep(self, count: int) -> None:
        """``count`` sweeps; the columns are met afterwards."""
        if self.alpha is not None and self.beta is not None:
            self._translate(self.alpha, self.beta)
        a, b, K = self.a, self.b, self.K
        transposed, u, v, sums = K.mT, self.u, self.v, self._row_sums()
        for _ in range(count):
            u = _damped(a / sums, self.alpha)
            v = _damped(b / (transposed @ u), self.beta)
            sums = K @ v
        self.u, self.v, self._sums = u, v, sums

    def _translate(self, alpha: Tensor, beta: Tensor) -> None:
        """Let the wanted row and column sums have the same mass, by a constant that the potentials exchange."""
        masses = [wanted(*side).sum(-2, keepdim=True) for side in ((self.a, self.u.log(), alpha), (self.b, self.v.log(), beta))]
        shift = (masses[0].log() - masses[1].log()) / (alpha + beta)
        self.a, self.b = self.a * torch.exp(-alpha * shift), self.b * torch.exp(beta * shift)
        self.phi, self.gamma = self.phi + shift.squeeze(-1), self.gamma - shift.squeeze(-1)

    def row_error(self) -> Tensor:
        """The 1-norm of what the row sums lack."""
        sums = self.u * self._row_sums()
        if self.alpha is None:
            return (sums - self.a).abs().sum((-1, -2))
        lacking = sums - wanted(self.a, self.u.log(), self.alpha)
        return lacking.abs().sum((-1, -2)) * self.mass / sums.sum((-1, -2))

    def potentials(self) -> tuple[Tensor, Tensor]:
        """φ and γ with the scalings absorbed; −inf where a marginal is zero."""
        return self.phi + self.u.squeeze(-1).log(), self.gamma + self.v.squeeze(-1).log()

    def has_grown(self) -> bool:
        """Whether K has lost what the scalings have gained."""
        return any(bool(((part.log().abs() > _GROWN) & (part > 0)).any()) for part in (self.u, self.v))

    def _row_sums(self) -> Tensor:
        if self._sums is None:
            self._sums = self.K @ self.v
        return self._sums


def wanted(marginal: Tensor, potential: Tensor, slack: Tensor | None) -> Tensor:
    """The sums that a plan with this potential must have: the marginal itself, or what its price leaves of it.

    Args:
        marginal: nonnegative.
        potential: in units of ε; what it says where the marginal is zero is ignored.
        slack: ε/ρ, or None.
    """
    if slack is None:
        return marginal
    return torch.where(marginal > 0, marginal * torch.exp(-slack * potential), 0)


def _damping(slack: Tensor | None) -> Tensor | float:
    return 1.0 if slack is None else 1 + slack.squeeze(-1)


def _damped(ratio: Tensor, slack: Tensor | None) -> Tensor:
    return ratio if slack is None else ratio ** (1 / (1 + slack))
