r"""The plan with a quadratic regularization, and the one with at most k nonzeros a column, from semismooth Newton steps.

Without k the dual function is smooth, and Newton's method (:mod:`~difflayers.transport.semismooth`) goes from large γ, whose plans are
dense, to γ itself. With k the columns must lie in a set that is not convex. Its convex envelope relaxes the problem to

.. math:: \min_{T, U} \; ⟨T, C⟩ + \frac{γ}{2} \sum_{ij} \frac{T_{ij}^2}{U_{ij}}, \qquad T \ge 0,\; T 1 = a,\; T^T 1 = b,\;
   0 \le U \le 1,\; U^T 1 \le k,

whose dual is the concave semi-dual of the sparse problem, with a kink wherever the k-th and the next entry of a column tie. The proximal
point method solves it: :math:`T ← \operatorname{argmin} \; \cdot + \frac{δ}{2} ‖T - T_0‖^2` with falling δ, each by Newton's method. It
needs no smoothness and no regularity, and ends with a plan T of the relaxed problem and with potentials; the gap between their two
values,

.. math:: \sum_j \Big( \frac{γ}{2} \sum_i \frac{T_{ij}^2}{U_{ij}} - ⟨T_j, v_j⟩ + \frac{1}{2γ} \sum_{\text{k largest}} (v_{ij})_+^2 \Big)
   \ge 0, \qquad v = α ⊕ β - C,

proves both optimal, if T meets the marginals. If T has at most k nonzeros a column it solves the sparse problem.

References: Liu, Puigcerver and Blondel, Sparsity-constrained optimal transport, ICLR 2023, arXiv:2209.15466; Rockafellar, Augmented
Lagrangians and applications of the proximal point algorithm in convex programming, Mathematics of Operations Research 1 (1976).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..convex.projections.simplex import simplex_support
from .arguments import marginal_error
from .semismooth import Quadratic, State, newton, state
from .support import Support

__all__ = ["Plan", "quadratic_plan", "sparse_plan"]

# The first γ or δ beside the one at which plans of that size and cost are dense; the next one is this part of it.
_DENSE, _FALL, _PROXIMAL_FALL, _PROXIMAL_LEAST = 0.02, 0.2, 0.3, 1e-2

# The relative error that is asked for on the way.
_NEAR, _PROXIMAL_NEAR = 0.1, 1e-2

# The gap, in tolerances, that proves a plan optimal; and what parts of the tolerance the inner iterations reach.
_CERTIFIED, _INNER = 10.0, 0.1


class Plan(NamedTuple):
    """What the search has found, with the columns first.

    Attributes:
        alpha: ``(N, n)``.
        beta: ``(N, m)``.
        support: ``(N, m, n)`` bool; the plan is (α ⊕ β − C)/γ there, and zero elsewhere.
        share: ``(N, m, n)``, U of the relaxed plan; without k the support.
        optimal: ``(N,)``, whether the potentials are proved to maximize the dual, as far as the marginals are met.
        iterations: ``(N,)``, Newton steps.
    """

    alpha: Tensor
    beta: Tensor
    support: Tensor
    share: Tensor
    optimal: Tensor
    iterations: Tensor


def quadratic_plan(X: Tensor, a: Tensor, b: Tensor, gamma: Tensor, tol: Tensor, max_iter: int) -> Plan:
    """min ⟨T, X⟩ + γ/2 ‖T‖² with the given marginals.

    Args:
        X: ``(N, m, n)``, the cost with the columns first; Newton's systems have the size n.
        a: ``(N, n)``, with the mass of b, which is positive.
        b: ``(N, m)``.
        gamma: ``(N,)``.
        tol: ``(N,)``, the marginal error (1-norm) to reach.
        max_iter: most Newton steps.
    """
    problem = Quadratic(X, a, b, gamma, torch.zeros_like(gamma), X.new_zeros(len(X), 1, 1))
    mass = a.sum(-1)
    levels = (torch.log(_dense(X, mass) / gamma) / -math.log(_FALL)).ceil().clamp(min=0).nan_to_num(0).to(torch.int64)
    alpha, beta = torch.zeros_like(a), _columns_met(X, torch.zeros_like(a), b, gamma * (1 / _FALL) ** levels, None)
    iterations = torch.zeros_like(levels)
    for remaining in range(int(levels.max()), -1, -1):
        index = (levels >= remaining).nonzero().squeeze(-1)
        part = problem.take(index)
        part = part._replace(gamma=part.gamma * (1 / _FALL) ** remaining)
        goal = _NEAR * mass[index] if remaining else tol[index]
        now, steps = newton(part, state(part, alpha[index], beta[index], None), None, goal, max_iter - iterations[index])
        alpha[index], beta[index] = now.alpha, now.beta
        iterations[index] += steps
    support = state(problem, alpha, beta, None).w > 0
    return Plan(alpha, beta, support, support.to(X.dtype), torch.ones_like(support[:, 0, 0]), iterations)


def sparse_plan(X: Tensor, a: Tensor, b: Tensor, gamma: Tensor, k: int, tol: Tensor, max_iter: int) -> Plan:
    """The same with at most k nonzeros a column, by way of the relaxed problem. The columns of the plan are met.

    Args:
        X: ``(N, m, n)``, the cost with the columns first.
        a: ``(N, n)``, with the mass of b, which is positive.
        b: ``(N, m)``.
        gamma: ``(N,)``.
        k: less than n.
        tol: ``(N,)``, the marginal error (1-norm) to reach.
        max_iter: most Newton steps.
    """
    found = quadratic_plan(X, a, b, gamma, tol, max_iter)
    # A plan of the problem without k that has few enough nonzeros solves the one with k, too.
    problem = Quadratic(X, a, b, gamma, torch.zeros_like(gamma), X.new_zeros(len(X), 1, 1))
    error = state(problem, found.alpha, found.beta, None).error()
    left = ((found.support.sum(-1) > k).any(-1) | ~(error <= tol)).nonzero().squeeze(-1)
    if left.numel():
        free = Plan(*(part[left] for part in found))
        constrained = _constrained_plan(problem.take(left), k, tol[left], max_iter, free)
        for target, source in zip(found, constrained, strict=True):
            target[left] = source
    return found


def _constrained_plan(problem: Quadratic, k: int, tol: Tensor, max_iter: int, free: Plan) -> Plan:
    """The plan where k matters, from the one without it."""
    X, a, b, gamma, *_ = problem
    alpha, beta, relaxed, share, iterations = _proximal_point(X, a, b, gamma, k, tol, max_iter, free)
    chosen = relaxed.topk(k, -1)
    support = torch.zeros_like(relaxed, dtype=torch.bool).scatter_(-1, chosen.indices, chosen.values > 0)
    # Where the relaxed plan is sparse, one linear system on its support gives it to the last digit, also where columns have ties.
    solved_alpha, solved_beta = _solved_on(support, problem, alpha, beta)
    v = torch.where(support, solved_alpha.unsqueeze(-2) + solved_beta.unsqueeze(-1) - X, 0)
    plan = v.clamp(min=0) / gamma[:, None, None]
    scale = _CERTIFIED * tol * (_range(X) + gamma * _quadratic(relaxed, share) / a.sum(-1))
    tight = (_error(problem, plan) <= tol) & (_gap(problem, solved_alpha, solved_beta, plan, plan > 0, k) <= scale)
    optimal = tight | ((_error(problem, relaxed) <= tol) & (_gap(problem, alpha, beta, relaxed, share, k) <= scale))
    # Elsewhere the potentials of the rows decide alone: the k largest entries of each column, ties broken by the relaxed plan.
    fallback = _columns_met(X, alpha, b, gamma, support)
    alpha = torch.where(tight.unsqueeze(-1), solved_alpha, alpha)
    beta = torch.where(tight.unsqueeze(-1), solved_beta, fallback)
    support &= alpha.unsqueeze(-2) + beta.unsqueeze(-1) - X > 0
    share = torch.where(tight[:, None, None], support.to(X.dtype), share)
    return Plan(alpha, beta, support, share, optimal, iterations)


def _proximal_point(
    X: Tensor, a: Tensor, b: Tensor, gamma: Tensor, k: int, tol: Tensor, max_iter: int, free: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """α, β, T and U of the relaxed problem, and the Newton steps."""
    mass = a.sum(-1)
    first = torch.maximum(_dense(X, mass), _PROXIMAL_LEAST * gamma)
    centre = torch.where(free.support, free.alpha.unsqueeze(-2) + free.beta.unsqueeze(-1) - X, 0) / gamma[:, None, None]
    problem = Quadratic(X, a, b, gamma, first, centre)
    now = state(problem, free.alpha, free.beta, k)
    found = State(*(part.clone() for part in now))
    index, iterations = torch.arange(mass.shape[0], device=mass.device), free.iterations.clone()
    goal, least = _PROXIMAL_NEAR * mass, _PROXIMAL_LEAST * first
    while index.numel():
        now, steps = newton(problem, now, k, goal[index], max_iter - iterations[index])
        iterations[index] += steps
        for target, source in zip(found, now, strict=True):
            target[index] = source
        moved = (now.plan - problem.centre).abs().amax((-1, -2)) * problem.delta
        settled = (moved <= _INNER * tol[index] / mass[index] * _range(problem.X)) & (now.error() <= _INNER * tol[index])
        left = (~settled & (iterations[index] < max_iter)).nonzero().squeeze(-1)
        index, problem, now = index[left], problem.take(left), now.take(left)
        goal = torch.maximum(0.1 * goal, _INNER * tol)
        problem = problem._replace(delta=torch.maximum(_PROXIMAL_FALL * problem.delta, least[index]), centre=now.plan)
        if index.numel():
            now = state(problem, now.alpha, now.beta, k)
    return found.alpha, found.beta, found.plan, found.share, iterations


def _solved_on(support: Tensor, problem: Quadratic, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The potentials next to the given ones whose plan on the support meets the marginals, as far as that is possible."""
    v = torch.where(support, alpha.unsqueeze(-2) + beta.unsqueeze(-1) - problem.X, 0)
    gamma = problem.gamma.unsqueeze(-1)
    lacking = torch.cat([gamma * problem.b - v.sum(-1), gamma * problem.a - v.sum(-2)], -1)
    step = Support(support).solve(lacking.unsqueeze(-1)).squeeze(-1)
    return alpha + step[:, beta.shape[-1] :], beta + step[:, : beta.shape[-1]]


def _columns_met(X: Tensor, alpha: Tensor, b: Tensor, gamma: Tensor, support: Tensor | None) -> Tensor:
    """The β with which α meets the columns on the support (None: everywhere)."""
    v = alpha.unsqueeze(-2) - X
    if support is not None:
        v = torch.where(support, v, -torch.inf)
    total = (gamma.unsqueeze(-1) * b).unsqueeze(-1)
    inside = simplex_support(v, total)
    beta = (total - torch.where(inside, v, 0).sum(-1, keepdim=True)) / inside.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(torch.isfinite(beta), beta, 0).squeeze(-1)


def _error(problem: Quadratic, plan: Tensor) -> Tensor:
    return marginal_error(plan, problem.b, problem.a)


def _gap(problem: Quadratic, alpha: Tensor, beta: Tensor, plan: Tensor, share: Tensor, k: int) -> Tensor:
    """The value of the relaxed plan less that of the potentials, without what the marginals lack."""
    held = (problem.a > 0).unsqueeze(-2) & (problem.b > 0).unsqueeze(-1)
    v = torch.where(held, alpha.unsqueeze(-2) + beta.unsqueeze(-1) - problem.X, 0)
    best = v.clamp(min=0).topk(k, -1).values.square().sum((-1, -2)) / (2 * problem.gamma)
    return problem.gamma / 2 * _quadratic(plan, share) - (plan * v).sum((-1, -2)) + best


def _quadratic(plan: Tensor, share: Tensor) -> Tensor:
    """Σ T²/U, ``(N,)``."""
    return torch.where(plan > 0, plan * plan / torch.where(plan > 0, share, 1), 0).sum((-1, -2))


def _range(X: Tensor) -> Tensor:
    return X.amax((-1, -2)) - X.amin((-1, -2))


def _dense(X: Tensor, mass: Tensor) -> Tensor:
    """A γ at which plans have many nonzeros."""
    return _DENSE * _range(X) * max(X.shape[-2:]) / mass
