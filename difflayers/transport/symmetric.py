r"""Sweeps for a cloud that is moved onto itself: a symmetric cost, and the same marginals on both sides.

Both potentials are one, and one sweep is the mean of itself and its image,

.. math:: φ_i ← \tfrac12 \big(φ_i + \log a_i - \log \sum_j e^{φ_j - X_{ij}}\big),

in units of ε. Near the solution it is linear with the matrix :math:`\tfrac12 (I - D^{-1} P)`, D = diag(a). Where the kernel
:math:`e^{-X}` is positive semidefinite, as it is for Euclidean distances and their squares, the eigenvalues of :math:`D^{-1} P` are between
0 and 1: the error is halved at least, at every temperature, and there is no need for a falling one. For other costs it may be slower, and
those are left to others.

References: Knight, Ruiz and Uçar, A symmetry preserving algorithm for matrix scaling, SIAM Journal on Matrix Analysis 35 (2014);
Feydy et al., Interpolating between optimal transport and MMD using Sinkhorn divergences, AISTATS 2019, arXiv:1810.08278.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sweeps import FLOOR, Scaled, Swept, log_sums

__all__ = ["is_symmetric", "symmetric_sweep"]

# Some more than halving needs from one to 1e-12.
_SWEEPS, _STRIDE = 60, 5


def is_symmetric(problem: Scaled) -> Tensor:
    """``(N,)``, which problems move a cloud onto itself."""
    X, a, b = problem[:3]
    if X.shape[-2] != X.shape[-1]:
        return torch.zeros(X.shape[0], dtype=torch.bool, device=X.device)
    same = (a == b).all(-1)
    return same & (X.mT == X).all(-1).all(-1) if bool(same.any()) else same


def symmetric_sweep(problem: Scaled, tol: Tensor) -> Swept:
    """Potentials that are equal on both sides; where the error is larger than ``tol``, they are not the solution.

    Args:
        problem: N problems of which :func:`is_symmetric` is true.
        tol: ``(N,)``, the marginal error (1-norm) to reach.
    """
    X, a = problem.X, problem.a
    phi = (a.log() - log_sums(X, torch.zeros_like(a), -1)) / 2
    found = Swept(phi, phi, torch.full_like(tol, torch.inf), torch.full_like(tol, _SWEEPS, dtype=torch.int64))
    index = torch.arange(X.shape[0], device=X.device)
    # The exponents are not positive: log_sums is at least each of its terms. Scalings of K take the place of exponentials.
    K = (phi.unsqueeze(-1) + phi.unsqueeze(-2)).sub_(X).clamp_(min=FLOOR).exp_()
    a = a.unsqueeze(-1)
    u = torch.ones_like(a)
    for done in range(_STRIDE, _SWEEPS + 1, _STRIDE):
        for _ in range(_STRIDE):
            u = (u * a / (K @ u)).sqrt_()
        error = (u * (K @ u) - a).abs().sum((-1, -2))
        stop = (error <= tol[index]) | (done == _SWEEPS)
        if bool(stop.any()):
            at = index[stop]
            found.phi[at] += u[stop].squeeze(-1).log()
            found.error[at], found.iterations[at] = error[stop], done
            index, K, a, u = index[~stop], K[~stop], a[~stop], u[~stop]
            if not index.numel():
                break
    return found
