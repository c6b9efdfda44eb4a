r"""Newton's method on the semi-dual of entropic optimal transport, for a batch of problems that stop one by one.

In units of ε, with the rows met by :math:`φ_i(γ) = \log a_i - \log \sum_j e^{γ_j - X_{ij}}`, the potentials of the columns maximize

.. math:: F(γ) = \sum_i a_i φ_i(γ) + \sum_j b_j γ_j, \qquad ∇F = b - P^T 1, \qquad
   ∇^2 F = -\left(\operatorname{diag}(P^T 1) - P^T \operatorname{diag}(1/a) P\right).

Where the sums may miss the marginals at the price ρ, with s = ε/ρ of its side, φ is divided by 1 + s, :math:`b_j` becomes :math:`w_j =
b_j e^{-s γ_j}`, and the Hessian, :math:`-(\operatorname{diag}(P^T 1 + s w) - P^T \operatorname{diag}(1/((1 + s) P 1)) P)`, is
nonsingular. The best constant to add to γ has a closed form, and is added wherever F is computed.

A step costs one product P^T P and one Cholesky factorization (:mod:`~difflayers.transport.laplacian`); Armijo's rule makes it safe. From
potentials of a few sweeps at falling ε it takes some five steps, where sweeps alone would take tens of thousands.

Reference: Brauer, Clason, Lorenz and Wirth, A Sinkhorn-Newton method for entropic optimal transport, 2017, arXiv:1710.06635.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .laplacian import Laplacian
from .sweeps import FLOOR, Scaled, Swept, wanted

__all__ = ["newton"]

_HALVINGS = 40
_CAUTION = 0.1


class _State(NamedTuple):
    """At γ: φ ``(N, n)``, Q = diag(P1)^(−1/2) P ``(N, n, m)``, the column error ``(N, m)``, its size and F ``(N,)``."""

    gamma: Tensor
    phi: Tensor
    Q: Tensor
    error: Tensor
    size: Tensor
    value: Tensor

    def take(self, index: Tensor) -> _State:
        return self if index.numel() == self.value.shape[0] else _State(*(part[index] for part in self))


def newton(problem: Scaled, gamma: Tensor, tol: Tensor, *, max_iter: int) -> Swept:
    """Maximize the semi-dual.

    Args:
        problem: N problems, best with no more columns than rows.
        gamma: ``(N, m)``, where to start; what it says of columns without mass is ignored.
        tol: ``(N,)``, the column error (1-norm) to reach.
        max_iter: most steps.

    Returns:
        Where it ended; the rows are met, and ``error`` is that of the columns. An element whose step gains nothing more stops.
    """
    now = _state(problem, torch.where(problem.b > 0, gamma, -torch.inf))
    index = torch.arange(gamma.shape[0], device=gamma.device)
    found = Swept(now.phi.clone(), now.gamma.clone(), now.size.clone(), torch.zeros_like(index))
    for iteration in range(max_iter + 1):
        for target, source in zip(found, (now.phi, now.gamma, now.size, torch.full_like(index, iteration)), strict=True):
            target[index] = source
        going = (now.size > tol[index]).nonzero().squeeze(-1)
        if iteration == max_iter or not going.numel():
            break
        index, problem, now = index[going], problem.take(going), now.take(going)
        # The shift keeps the step within some units where the Hessian is nearly singular, and vanishes with the error.
        relative = _CAUTION * now.size.unsqueeze(-1) / problem.a.sum(-1, keepdim=True)
        step = _laplacian(problem, now, relative).solve(now.error.unsqueeze(-1)).squeeze(-1)
        now, gained = _line_search(problem, now, step)
        if not bool(gained.all()):
            kept = gained.nonzero().squeeze(-1)
            index, problem, now = index[kept], problem.take(kept), now.take(kept)
            if not kept.numel():
                break
    return found


def _line_search(problem: Scaled, now: _State, step: Tensor) -> tuple[_State, Tensor]:
    """The next state of each element, and whether it is a better one."""
    size, slope = now.size, (now.error * step).sum(-1)
    new = _state(problem, now.gamma + step)
    length = 1.0
    waiting = (~_accepted(new, now.value, slope, size)).nonzero().squeeze(-1)
    for _ in range(_HALVINGS):
        if not waiting.numel():
            break
        length /= 2
        tried = _state(problem.take(waiting), now.gamma[waiting] + length * step[waiting])
        for target, source in zip(new, tried, strict=True):
            target[waiting] = source
        waiting = waiting[~_accepted(tried, now.value[waiting], length * slope[waiting], size[waiting])]
    gained = torch.ones_like(size, dtype=torch.bool)
    gained[waiting] = False
    return new, gained


def _accepted(new: _State, value: Tensor, slope: Tensor, size: Tensor) -> Tensor:
    # Near the maximum the gain of F drowns in its rounding, and the error decides.
    return (new.value > value + 1e-4 * slope) | (new.size <= 0.9 * size)


def _state(problem: Scaled, gamma: Tensor) -> _State:
    X, a, b, slack = problem
    Q = gamma.unsqueeze(-2) - X
    top = Q.amax(-1, keepdim=True)
    Q.sub_(top).clamp_(min=FLOOR).exp_()
    sums = Q.sum(-1)
    phi = a.log() - sums.log() - top.squeeze(-1)
    alpha = beta = None
    if slack is not None:
        alpha, beta = slack.split(1, -1)
        phi = phi / (1 + alpha)
        shift = (_log_mass(a, phi, alpha) - _log_mass(b, gamma, beta)) / (alpha / (1 + alpha) + beta)
        phi, gamma = phi + shift / (1 + alpha), gamma - shift
    rows, columns = wanted(a, phi, alpha), wanted(b, gamma, beta)
    root = rows.sqrt()
    Q.mul_((root / sums).unsqueeze(-1))
    error = torch.where(b > 0, columns - (root.unsqueeze(-2) @ Q).squeeze(-2), 0)
    size, value = error.abs().sum(-1), _gain(a, phi, alpha) + _gain(b, gamma, beta)
    if slack is not None:
        mass = rows.sum(-1)
        size, value = size * a.sum(-1) / mass, value - mass
    return _State(gamma, phi, Q, error, size, value)


def _log_mass(marginal: Tensor, potential: Tensor, slack: Tensor) -> Tensor:
    """log Σ of the sums that are wanted, ``(N, 1)``."""
    return torch.logsumexp(torch.where(marginal > 0, marginal.log() - slack * potential, -torch.inf), -1, keepdim=True)


def _gain(marginal: Tensor, potential: Tensor, slack: Tensor | None) -> Tensor:
    """⟨marginal, potential⟩, or what the price makes of it: Σ marginal (1 − exp(−s potential)) / s."""
    if slack is not None:
        small = slack * potential.abs() < torch.finfo(potential.dtype).tiny
        potential = torch.where(small, potential, -torch.expm1(-slack * potential) / torch.where(slack > 0, slack, 1))
    return torch.where(marginal > 0, marginal * potential, 0).sum(-1)


def _laplacian(problem: Scaled, now: _State, relative: Tensor) -> Laplacian:
    """The Hessian −∇²F, with its diagonal shifted by a part of the column sums that are wanted."""
    if problem.slack is None:
        return Laplacian(now.Q, torch.where(problem.b > 0, relative * problem.b, 1))
    alpha, beta = problem.slack.split(1, -1)
    columns = wanted(problem.b, now.gamma, beta)
    excess = beta * columns + alpha / (1 + alpha) * (columns - now.error)
    return Laplacian(now.Q / (1 + alpha).sqrt().unsqueeze(-1), torch.where(problem.b > 0, relative * columns, 1), excess)
