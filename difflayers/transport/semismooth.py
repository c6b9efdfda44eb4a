r"""Semismooth Newton steps for transport with a quadratic regularization, for a batch of problems that stop one by one.

With :math:`w = α ⊕ β - C + δ T_0` the dual function is a sum of terms, one a column, that are convex and piecewise quadratic in w:

.. math:: \max_{α, β} \; ⟨a, α⟩ + ⟨b, β⟩ - \sum_j φ(w_j), \qquad \nabla φ(w) = T = \frac{w\, u}{γ + δ u}, \qquad
   u = 1_{w > 0} \;\text{ or, with } k, \; u = \operatorname{clip}\Big(\frac{w s - γ}{δ}, 0, 1\Big), \;\; \sum_i u_{ij} = k .

Without k and δ this is the dual of :math:`⟨T, C⟩ + \frac{γ}{2} ‖T‖^2`. With k, φ is the conjugate of the convex envelope of "at most k
nonzeros", to which the proximal term :math:`\frac{δ}{2} ‖T - T_0‖^2` is added. In both cases a generalized Hessian is a graph
Laplacian on the rows once the columns are eliminated (:mod:`~difflayers.transport.laplacian`): a column with full entries F and
fractional ones E contributes

.. math:: J = \frac{\operatorname{diag}(1_F)}{γ + δ} + \frac1δ \Big(\operatorname{diag}(1_E) - \frac{γ}{N} 1_E 1_E^T\Big), \qquad
   N = δ (k - |F|) + γ |E| .

References: Blondel, Seguy and Rolet, Smooth and sparse optimal transport, AISTATS 2018, arXiv:1710.06276; Li, Sun and Toh, On the efficient
computation of a generalized Jacobian of the projector over the Birkhoff polytope, Mathematical Programming 179 (2020), arXiv:1702.05934.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .laplacian import Laplacian

__all__ = ["Quadratic", "State", "newton", "state"]

# The diagonal's shift beside the Hessian's scale, times the relative error; it vanishes with the error.
_CAUTION, _LEAST = 1e-2, 1e-12

# The line search ends where this part of the slope is left, or this part of the error.
_FLAT, _HALVED, _TRIALS = 0.3, 0.5, 16


class Quadratic(NamedTuple):
    """N problems with the columns first: X ``(N, m, n)``, a ``(N, n)``, b ``(N, m)``, γ and δ ``(N,)``, T₀ ``(N, m, n)`` or (N, 1, 1)."""

    X: Tensor
    a: Tensor
    b: Tensor
    gamma: Tensor
    delta: Tensor
    centre: Tensor

    def take(self, index: Tensor) -> Quadratic:
        """The problems of ``index``; all of them are not copied."""
        return self if index.numel() == self.X.shape[0] else Quadratic(*(part[index] for part in self))


class State(NamedTuple):
    """At α ``(N, n)`` and β ``(N, m)``: the plan T, the shares u and w, ``(N, m, n)``, and what the marginals lack."""

    alpha: Tensor
    beta: Tensor
    plan: Tensor
    share: Tensor
    w: Tensor
    rows: Tensor
    columns: Tensor

    def take(self, index: Tensor) -> State:
        """The states of ``index``; all of them are not copied."""
        return self if index.numel() == self.alpha.shape[0] else State(*(part[index] for part in self))

    def error(self) -> Tensor:
        """The larger of the 1-norms of the two sides, ``(N,)``."""
        return torch.maximum(self.rows.abs().sum(-1), self.columns.abs().sum(-1))


def state(problem: Quadratic, alpha: Tensor, beta: Tensor, k: int | None) -> State:
    """What the dual variables stand for.

    Args:
        problem: N problems.
        alpha: ``(N, n)``.
        beta: ``(N, m)``.
        k: most nonzeros of a column, or None.
    """
    X, a, b, gamma, delta, centre = problem
    w = (alpha.unsqueeze(-2) + beta.unsqueeze(-1)).sub_(X).add_(delta[:, None, None] * centre)
    w = torch.where((a > 0).unsqueeze(-2) & (b > 0).unsqueeze(-1), w.clamp_(min=0), 0)
    gamma, delta = gamma[:, None, None], delta[:, None, None]
    share = (w > 0).to(w.dtype) if k is None else _shares(w, k, gamma, delta)
    plan = w / (gamma + delta) if k is None else w * share / (gamma + delta * share)
    return State(alpha, beta, plan, share, w, a - plan.sum(-2), b - plan.sum(-1))


def newton(problem: Quadratic, start: State, k: int | None, tol: Tensor, budget: Tensor) -> tuple[State, Tensor]:
    """Maximize the dual function.

    Args:
        problem: N problems.
        start: where to start.
        k: most nonzeros of a column, or None.
        tol: ``(N,)``, the marginal error (1-norm) to reach.
        budget: ``(N,)``, most steps.

    Returns:
        Where it ended, and the steps that took, ``(N,)``.
    """
    now, index = start, torch.arange(tol.shape[0], device=tol.device)
    found = State(*(part.clone() for part in start))
    steps = torch.zeros_like(budget)
    while True:
        going = ((now.error() > tol[index]) & (steps[index] < budget[index])).nonzero().squeeze(-1)
        if not going.numel():
            return found, steps
        index, problem, now = index[going], problem.take(going), now.take(going)
        now = _line_search(problem, now, k, *_direction(problem, now, k))
        steps[index] += 1
        for target, source in zip(found, now, strict=True):
            target[index] = source


def _direction(problem: Quadratic, now: State, k: int | None) -> tuple[Tensor, Tensor]:
    """Newton's direction in α and β."""
    gamma, delta = problem.gamma[:, None, None], problem.delta[:, None, None]
    error = torch.maximum(now.rows.abs().sum(-1), now.columns.abs().sum(-1)) / problem.a.sum(-1)
    shift = ((_LEAST + _CAUTION * error.clamp(max=1)) / (problem.gamma + problem.delta)).unsqueeze(-1)
    if k is None:
        Y = now.share / (gamma + delta)
    else:
        full, part = (now.share >= 1).to(now.w.dtype), ((now.share > 0) & (now.share < 1)).to(now.w.dtype)
        left, count = delta * (k - full.sum(-1, keepdim=True)), part.sum(-1, keepdim=True)
        N = torch.where(count > 0, left + gamma * count, 1)
        Y = full / (gamma + delta) + part * (left / (delta * N))
    sums = Y.sum(-1) + shift
    Q = Y / sums.sqrt().unsqueeze(-1)
    if k is not None:
        Q = torch.cat([Q, part * (gamma / (delta * N)).sqrt()], -2)
    ratio = (torch.stack([shift / sums, now.columns / sums], -2) @ Y).unbind(-2)
    alpha = Laplacian(Q, shift + ratio[0]).solve((now.rows - ratio[1]).unsqueeze(-1)).squeeze(-1)
    return alpha, (now.columns - (Y @ alpha.unsqueeze(-1)).squeeze(-1)) / sums


def _line_search(problem: Quadratic, now: State, k: int | None, alpha: Tensor, beta: Tensor) -> State:
    """The next state: the slope along the direction, which falls, is followed until little of it is left.

    Values are never asked for: near the maximum they drown in rounding.
    """

    def slope_of(new: State, part: Tensor) -> Tensor:
        return (new.rows * alpha[part]).sum(-1) + (new.columns * beta[part]).sum(-1)

    waiting = torch.arange(alpha.shape[0], device=alpha.device)
    error, first = now.error(), slope_of(now, waiting)
    length = torch.ones_like(error)
    low, low_slope = torch.zeros_like(error), first.clone()
    high, high_slope = torch.full_like(error, torch.inf), torch.zeros_like(error)
    new = state(problem, now.alpha + alpha, now.beta + beta, k)
    tried = new
    for _ in range(_TRIALS):
        slope = slope_of(tried, waiting)
        done = (slope.abs() <= _FLAT * first[waiting]) | (tried.error() <= _HALVED * error[waiting])
        rising, t = slope > 0, length[waiting]
        low[waiting], low_slope[waiting] = torch.where(rising, t, low[waiting]), torch.where(rising, slope, low_slope[waiting])
        high[waiting], high_slope[waiting] = torch.where(rising, high[waiting], t), torch.where(rising, high_slope[waiting], slope)
        waiting = waiting[~done]
        if not waiting.numel():
            break
        at, to, up, down = low[waiting], high[waiting], low_slope[waiting], high_slope[waiting]
        secant = at + (to - at) * (up / (up - down)).clamp(0.1, 0.9)
        length[waiting] = torch.where(torch.isfinite(to), secant, 2 * at)
        t = length[waiting].unsqueeze(-1)
        tried = state(problem.take(waiting), now.alpha[waiting] + t * alpha[waiting], now.beta[waiting] + t * beta[waiting], k)
        if waiting.numel() == alpha.shape[0]:
            new = tried
            continue
        for target, source in zip(new, tried, strict=True):
            target[waiting] = source
    return new


def _shares(w: Tensor, k: int, gamma: Tensor, delta: Tensor) -> Tensor:
    """u of each column ``(N, m, n)``: the sum of the clipped lines of w meets k between two of their ends."""
    n = w.shape[-1]
    few = (w > 0).sum(-1, keepdim=True) <= k
    safe = torch.where(w > 0, w, 1)
    ends = torch.where((w > 0).repeat(1, 1, 2), torch.cat([gamma / safe, (gamma + delta) / safe], -1), torch.inf)
    ends, order = ends.sort(-1)
    slopes = torch.cat([w, -w], -1).gather(-1, order).cumsum(-1)
    levels = torch.cat([-gamma.expand_as(w), (gamma + delta).expand_as(w)], -1).gather(-1, order).cumsum(-1)
    sums = torch.where(torch.isfinite(ends), ends * slopes + levels, torch.inf)
    last = ((sums < delta * k).sum(-1, keepdim=True) - 1).clamp(min=0)
    slope, level = slopes.gather(-1, last), levels.gather(-1, last)
    s = (delta * k - level) / torch.where(slope > 0, slope, 1)
    # Rounding may leave the piece; its ends are exact.
    s = torch.minimum(torch.maximum(s, ends.gather(-1, last)), ends.gather(-1, (last + 1).clamp(max=2 * n - 1)))
    s = torch.where(few, 1, s)
    return torch.where(few, (w > 0).to(w.dtype), ((w * s - gamma) / delta).clamp(0, 1))
