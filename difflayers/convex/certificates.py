r"""Proofs that a QP has no solution, and the auxiliary problems that find them.

A QP with the constraints :math:`Ax = b`, :math:`Cx \le d` (C stacks G, −I and I; d stacks h, −l and u) has

* no feasible point if some :math:`(y, z \ge 0)` has :math:`A^\top y + C^\top z = 0` and :math:`b^\top y + d^\top z < 0` (Farkas): a
  feasible x would give :math:`0 = y^\top A x + z^\top C x \le b^\top y + d^\top z`;
* no lower bound, if it is feasible, if some ray d has :math:`Pd = 0, Ad = 0, Gd \le 0`, does not point out of the bounds, and
  :math:`q^\top d < 0`.

Both always follow from a QP that always has a solution. The least-squares violation
:math:`\min \tfrac12\|t\|^2 + \tfrac12\|v\|^2` s.t. :math:`Gx - t \le h`, :math:`Ax - v = b`, :math:`l \le x \le u` has multipliers
:math:`z = t`, :math:`y = v` that are a Farkas certificate unless they vanish. The projection of −q on the cone of recession,
:math:`\min \tfrac12\|d\|^2 + q^\top d` s.t. :math:`Pd = 0, Ad = 0, Gd \le 0` and the signs of the bounds, is a ray unless it vanishes.

In floating point a certificate proves what it says up to a distance: with :math:`\|A^\top y + C^\top z\|_\infty = \eta` there is no
feasible x with :math:`\|x\|_1 < -(b^\top y + d^\top z) / \eta`. That distance must exceed a multiple of the size of the problem.

References:
    S. Boyd, L. Vandenberghe, Convex Optimization (2004), section 5.8.
    G. Banjac et al., Infeasibility detection in the alternating direction method of multipliers for convex optimization, JOTA (2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .normal_equations import DenseQP, KKTPoint, each, product

__all__ = [
    "feasibility_problem",
    "infeasibility_certificate",
    "nearest_point_problem",
    "proves_infeasible",
    "proves_unbounded",
    "recession_problem",
]

REACH = 1e7  # a certificate holds for every x up to this many times the size of the problem
_CANCELLED = 1e-9  # a sum that is smaller than this share of its terms may be rounding


def proves_infeasible(problem: DenseQP, point: KKTPoint) -> Tensor:
    """Whether the multipliers of ``point`` show that no x within reach is feasible; ``(B,)`` bool.

    The size of the problem is the distance from the origin of the boundaries that the certificate uses.
    """
    pull = _times(point.y, problem.A) + _times(point.z, problem.G)
    parts = [(problem.b, point.y, _norms(problem.A)), (problem.h, point.z, _norms(problem.G))]
    if problem.lb is not None and problem.ub is not None:
        pull = pull - point.z_lower + point.z_upper
        parts += [(-problem.lb, point.z_lower, torch.ones_like(pull)), (problem.ub, point.z_upper, torch.ones_like(pull))]
    terms = torch.cat([torch.where(limits.isinf(), 0.0, limits) * multipliers for limits, multipliers, _ in parts], -1)
    forces = torch.cat([multipliers.abs() * norms for _, multipliers, norms in parts], -1).sum(-1)
    value, total = -terms.sum(-1), terms.abs().sum(-1)
    return (value > _CANCELLED * total) & (value * forces > REACH * total * pull.abs().amax(-1))


def proves_unbounded(problem: DenseQP, ray: Tensor) -> Tensor:
    """Whether the objective falls along ``ray`` ``(B, n)`` for ``REACH`` times its length inside the constraints; ``(B,)`` bool."""
    P, q, G, h, A, _, lb, ub = problem
    length = ray.abs().amax(-1)
    fall = -(q * ray).sum(-1)
    curve = _times(ray, P.mT).abs().amax(-1)
    leaving = _scaled(ray, A).abs().amax(-1) if A.shape[1] else torch.zeros_like(length)
    if G.shape[1]:
        leaving = torch.maximum(leaving, torch.where(h.isinf(), 0.0, _scaled(ray, G)).amax(-1))
    if lb is not None and ub is not None:
        out = torch.maximum(torch.where(lb.isinf(), 0.0, -ray), torch.where(ub.isinf(), 0.0, ray)).amax(-1)
        leaving = torch.maximum(leaving, out)
    push = q.abs().amax(-1)
    return (fall > 1e-6 * push * length) & (leaving * REACH <= length) & (curve * length * REACH <= fall * (1 + push))


def feasibility_problem(problem: DenseQP) -> DenseQP:
    """The least-squares violation over (x, t, v), with the rows of G and A scaled to unit length; always has a solution."""
    _, q, G, h, A, b, lb, ub = problem
    (batch, n), m, p = q.shape, G.shape[1], A.shape[1]
    G, h = _normalize(G, h)
    A, b = _normalize(A, b)
    eye = torch.eye(m + p, dtype=q.dtype, device=q.device)
    P = q.new_zeros(1, n + m + p, n + m + p)
    P[:, n:, n:] = eye
    G = torch.cat((G, -eye[:m].expand(G.shape[0], -1, -1)), -1)
    A = torch.cat((A, -eye[m:].expand(A.shape[0], -1, -1)), -1)
    free = q.new_full((batch, m + p), torch.inf)
    if lb is not None and ub is not None:
        lb, ub = torch.cat((lb, -free), -1), torch.cat((ub, free), -1)
    return DenseQP(P, q.new_zeros(batch, n + m + p), G, h, A, b, lb, ub)


def infeasibility_certificate(problem: DenseQP, violation: KKTPoint) -> KKTPoint:
    """The Farkas certificate of ``problem``, of largest entry one, from the solution of its feasibility problem."""
    n = problem.q.shape[1]
    y, z = violation.y / _norms(problem.A), violation.z / _norms(problem.G)
    bounds = (None, None) if problem.lb is None else (violation.z_lower[:, :n], violation.z_upper[:, :n])
    parts = [t for t in (y, z, *bounds) if t is not None]
    largest = torch.cat([torch.zeros_like(problem.q[:, :1]), *parts], -1).abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return KKTPoint(violation.x[:, :n], *each(lambda t: t / largest, (y, z, *bounds)))


def recession_problem(problem: DenseQP) -> DenseQP:
    """The projection of −q / max |q| on the cone of recession; always has a solution."""
    P, q, G, h, A, b, lb, ub = problem
    (batch, n), p = q.shape, A.shape[1]
    largest = q.abs().amax(-1, keepdim=True)
    P, _ = _normalize(P, torch.zeros_like(q))
    G, _ = _normalize(G, h)
    A, _ = _normalize(A, b)
    shared = max(P.shape[0], A.shape[0])
    A = torch.cat((P.expand(shared, -1, -1), A.expand(shared, -1, -1)), 1)
    eye = torch.eye(n, dtype=q.dtype, device=q.device).unsqueeze(0)
    h = torch.where(h.isinf(), h, 0.0)
    if lb is not None and ub is not None:
        lb, ub = torch.where(lb.isinf(), lb, 0.0), torch.where(ub.isinf(), ub, 0.0)
    return DenseQP(eye, q / torch.where(largest > 0, largest, 1.0), G, h, A, q.new_zeros(batch, n + p), lb, ub)


def nearest_point_problem(problem: DenseQP, x: Tensor) -> DenseQP:
    """The projection of ``x`` ``(B, n)`` on the feasible set; has a solution if and only if that is not empty."""
    return problem._replace(P=torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).unsqueeze(0), q=-x)


def _times(vector: Tensor, matrix: Tensor) -> Tensor:
    return product(vector.unsqueeze(1), matrix).squeeze(1)


def _norms(matrix: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(matrix, dim=-1)
    return torch.where(norms > 0, norms, 1.0)


def _normalize(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    norms = _norms(matrix)
    return matrix / norms.unsqueeze(-1), rhs / norms


def _scaled(vector: Tensor, matrix: Tensor) -> Tensor:
    return _times(vector, matrix.mT) / _norms(matrix)
