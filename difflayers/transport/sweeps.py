r"""Sinkhorn's sweeps, for a batch of problems that stop one by one.

With potentials in units of ε (φ = f/ε, γ = g/ε, X = C/ε) one sweep meets the rows, then the columns:

.. math:: φ_i = \log a_i - \log \sum_j e^{γ_j - X_{ij}}, \qquad γ_j = \log b_j - \log \sum_i e^{φ_i - X_{ij}} .

After half a sweep in the log domain the kernel :math:`K = e^{φ ⊕ γ - X}` has entries of the size of the marginals, and further sweeps are
products with it, :math:`u = a / (K v)`, :math:`v = b / (K^T u)`: the same iteration without the exponentials. Scalings that have grown
large are absorbed into the potentials, and K is made anew.

References: Cuturi, Sinkhorn distances, NeurIPS 2013, arXiv:1306.0895; Schmitzer, Stabilized sparse scaling algorithms for entropy
regularized transport problems, SIAM Journal on Scientific Computing 41 (2019), arXiv:1610.06519.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FLOOR", "STRIDE", "Scaled", "Swept", "log_sums", "sweep"]

# exp is many times slower where it underflows, and so are products of numbers next to zero: exponents are cut off here.
FLOOR = -300.0

# Sweeps between two looks at the rate of convergence. With so many entries the error is looked at after each of them.
STRIDE, _LARGE = 10, 100_000

# Scalings beyond e^±_GROWN are absorbed.
_GROWN = 50.0


class Scaled(NamedTuple):
    """Problems in units of ε: X ``(N, n, m)``, and marginals a ``(N, n)`` and b ``(N, m)`` of equal, positive mass."""

    X: Tensor
    a: Tensor
    b: Tensor

    def take(self, index: Tensor) -> Scaled:
        """The problems of ``index``; all of them are not copied."""
        return self if index.numel() == self.X.shape[0] else Scaled(*(part[index] for part in self))


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
        X, a, b = problem
        self.gamma = torch.where(b > 0, gamma, -torch.inf)
        self.phi = a.log() - log_sums(X, self.gamma, -1)
        self.a, self.b = a.unsqueeze(-1), b.unsqueeze(-1)
        self.u = torch.ones_like(self.a)
        self._set_kernel(X)
        if self.has_grown():
            # Columns that the cut exponents have lost are found again in the log domain.
            self.gamma = b.log() - log_sums(X, self.phi, -2)
            self._set_kernel(X)

    def _set_kernel(self, X: Tensor) -> None:
        """K, and the v that meets its columns."""
        self.K = self.phi.unsqueeze(-1).sub(X).add_(self.gamma.unsqueeze(-2)).clamp_(min=FLOOR).exp_()
        self.v = self.b / (self.K.mT @ self.u)
        self._sums: Tensor | None = None

    def take(self, index: Tensor) -> _Kernel:
        """The kernels of ``index``."""
        part = object.__new__(_Kernel)
        for name, value in vars(self).items():
            setattr(part, name, None if value is None else value[index])
        return part

    def sweep(self, count: int) -> None:
        """``count`` sweeps; the columns are met afterwards."""
        a, b, K = self.a, self.b, self.K
        transposed, u, v, sums = K.mT, self.u, self.v, self._row_sums()
        for _ in range(count):
            u = a / sums
            v = b / (transposed @ u)
            sums = K @ v
        self.u, self.v, self._sums = u, v, sums

    def row_error(self) -> Tensor:
        """The 1-norm of what the row sums lack."""
        return (self.u * self._row_sums() - self.a).abs().sum((-1, -2))

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
