r"""A batch of dense quadratic programs, how well a point solves them, and the one matrix that every solve in this family factors.

The problem, per batch element, is :math:`\min \tfrac12 x^\top P x + q^\top x` subject to :math:`Ax = b`, :math:`Gx \le h` and
:math:`l \le x \le u`. Its optimality (Karush, Kuhn, Tucker) conditions, with multipliers y, z ≥ 0, :math:`z_l` ≥ 0 and :math:`z_u` ≥ 0, are

.. math:: Px + q + A^\top y + G^\top z - z_l + z_u = 0, \quad Ax = b, \quad Gx \le h, \quad l \le x \le u, \quad
   z^\top(h - Gx) = z_l^\top(x - l) = z_u^\top(u - x) = 0.

Newton's method on them, whether along the central path or on a fixed active set, gives every constraint a weight and reduces to

.. math:: K = P + \delta + A^\top W_A A + G^\top W G + D,

with the proximal terms :math:`\delta` and :math:`W_A^{-1}` small against the curvature of the problem, so that K is positive definite
whatever the ranks of P, A and G. The bounds only touch the diagonal D. The weights are invariant under a scaling of the rows, of the
variables and of the cost, as the Cholesky factor is: that is the equilibration, and no scaled copy of the data is made.

Vectors are rows here, ``(B, R, n)`` for R vectors per element, and a matrix of batch size 1 is shared by the batch and never expanded.

References:
    L. Vandenberghe, The CVXOPT linear and quadratic cone program solvers (2010).
    R. Schwan et al., PIQP: a proximal interior-point quadratic programming solver, CDC (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DenseQP",
    "KKTError",
    "KKTPoint",
    "MaybeTensor",
    "NormalEquations",
    "SaddleFactor",
    "each",
    "kkt_error",
    "product",
    "stable_cholesky",
    "take",
]

ABSENT = 1e20  # limits of this size and beyond are none
_DAMPING = 1e-10  # proximal term over the curvature of its column
_ROUNDING = 1e-14  # diagonal entries grow by this share of themselves, so that rounding cannot make K indefinite
_SCHUR_DAMPING = 1e-9  # keeps the multipliers of dependent equalities from drifting apart
PENALTY = 1e6  # weight of an equation over the curvature along it; its inverse is the contraction of one refinement

# A tensor, or None: a problem has both bounds or neither, which a type checker cannot carry from one tensor to the next.
MaybeTensor = Any


class DenseQP(NamedTuple):
    """One batch of quadratic programs: ``min ½xᵀPx + qᵀx  s.t.  Gx ≤ h, Ax = b, lb ≤ x ≤ ub``.

    Attributes:
        P: ``(B, n, n)``, or ``(1, n, n)`` when the batch shares it; symmetric.
        q: ``(B, n)``.
        G: ``(B, m, n)`` or ``(1, m, n)``; m may be 0.
        h: ``(B, m)``; an entry +inf says that the row is absent.
        A: ``(B, p, n)`` or ``(1, p, n)``; p may be 0.
        b: ``(B, p)``.
        lb: ``(B, n)`` with -inf where there is no bound, or None without any bounds.
        ub: ``(B, n)`` with +inf where there is no bound, or None together with ``lb``.
    """

    P: Tensor
    q: Tensor
    G: Tensor
    h: Tensor
    A: Tensor
    b: Tensor
    lb: MaybeTensor = None
    ub: MaybeTensor = None

    def take(self, index: Tensor | slice) -> DenseQP:
        """The elements ``index`` of the batch; what is shared stays shared."""
        return DenseQP(*(take(t, index) for t in self))


class KKTPoint(NamedTuple):
    """Primal and dual variables, or any vector of that shape, ``(*R, B, ·)``; without bounds the last two are None."""

    x: Tensor
    y: Tensor
    z: Tensor
    z_lower: MaybeTensor = None
    z_upper: MaybeTensor = None


class KKTError(NamedTuple):
    """How far a point is from optimal, ``(B,)`` each.

    Attributes:
        primal_residual: the largest violation of a constraint.
        dual_residual: the largest entry of the gradient of the Lagrangian.
        duality_gap: the difference of the primal and the dual objective.
        relative: the largest of the three, each over one plus the size of the terms that it adds up.
    """

    primal_residual: Tensor
    dual_residual: Tensor
    duality_gap: Tensor
    relative: Tensor


def take(tensor: MaybeTensor, index: Tensor | slice) -> MaybeTensor:
    """The elements ``index`` of a batched tensor; None and matrices that the batch shares are returned as they are."""
    return tensor if tensor is None or (tensor.dim() == 3 and tensor.shape[0] == 1) else tensor[index]


def each(function: Callable[[Tensor], Tensor], tensors: Iterable[MaybeTensor]) -> tuple[MaybeTensor, ...]:
    """``function`` of every tensor that is there."""
    return tuple(None if tensor is None else function(tensor) for tensor in tensors)


def product(vectors: Tensor, matrix: Tensor) -> Tensor:
    """Row vectors times a batched or a shared matrix: ``(B, R, k) · (B or 1, k, l)``."""
    return torch.bmm(vectors, matrix) if matrix.shape[0] == vectors.shape[0] else vectors @ matrix[0]


def stable_cholesky(matrix: Tensor, damping: float = _ROUNDING) -> Tensor:
    """Lower Cholesky factor of a positive semidefinite batch, which is overwritten: its diagonal grows by the share ``damping``."""
    matrix.diagonal(dim1=-2, dim2=-1).mul_(1 + damping)
    factor, info = torch.linalg.cholesky_ex(matrix)
    failed = info > 0
    if bool(failed.any()):  # an identity keeps the neighbours finite; the residual of the solve will tell
        factor = torch.where(failed.view(-1, 1, 1), torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device), factor)
    return factor


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return product(vector.unsqueeze(1), matrix.mT).squeeze(1)


def _largest(*tensors: Tensor) -> Tensor:
    return torch.cat([t.abs() for t in tensors], -1).amax(-1)


def kkt_error(problem: DenseQP, point: KKTPoint) -> KKTError:
    """Measure the optimality conditions at ``point`` in the data as given; its inequality multipliers must be nonnegative."""
    P, q, G, h, A, b, lb, ub = problem
    x, y, z, z_lower, z_upper = point
    curve, pull_y, pull_z, value_A, value_G = _times(P, x), _times(A.mT, y), _times(G.mT, z), _times(A, x), _times(G, x)
    gradient = curve + q + pull_y + pull_z
    violation = [(value_A - b) / (1 + b.abs()), (value_G - h).clamp(min=0) / (1 + h.abs())]
    absolute = [value_A - b, (value_G - h).clamp(min=0)]
    terms = [(curve * x).sum(-1), (q * x).sum(-1), (b * y).sum(-1), (torch.where(h.isinf(), 0.0, h) * z).sum(-1)]
    if lb is not None and ub is not None:
        gradient = gradient - z_lower + z_upper
        pull_z = torch.maximum(pull_z.abs(), torch.maximum(z_lower, z_upper))
        outside = torch.maximum(lb - x, x - ub).clamp(min=0)
        violation.append(outside / (1 + x.abs()))
        absolute.append(outside)
        terms += [-(torch.where(lb.isinf(), 0.0, lb) * z_lower).sum(-1), (torch.where(ub.isinf(), 0.0, ub) * z_upper).sum(-1)]
    zero = torch.zeros_like(q[:, :1])
    stacked = torch.stack(terms)
    gap, dual = stacked.sum(0).abs(), gradient.abs().amax(-1)
    relative = torch.stack(
        (_largest(zero, *violation), dual / (1 + _largest(curve, q, pull_y, pull_z)), gap / (1 + stacked.abs().amax(0)))
    ).amax(0)
    return KKTError(_largest(zero, *absolute), dual, gap, relative)


class NormalEquations:
    """The matrices K of one batch of problems, for any weights of the inequalities; keeps what they have in common.

    Attributes:
        rows: ``(B or 1, p + m, n)``, A on top of G; a row of G with an infinite right-hand side is zero.
        scale: ``(B or 1, 1, n)``, the curvature along each variable, in the units of P.
        row_scale: ``(B or 1, 1, p + m)``, the curvature along each row; 0 for a zero row.
        unit: ``(B or 1, 1, 1)``, the mean curvature of P; of a zero P, the size of q over the size of x.
        lengths: ``(B or 1, 1, p + m)``, the squared lengths of the rows; 1 for a zero row.
        size: ``(B, 1, 1)``, the size of x: the largest distance of a constraint's boundary from the origin, or 1.
    """

    def __init__(self, problem: DenseQP) -> None:
        rows, p = _stack(problem.A, problem.G), problem.A.shape[1]
        absent = problem.h.isposinf()
        if bool(absent.any()):
            rows = rows * torch.cat((torch.ones_like(problem.b), (~absent).to(rows.dtype)), -1).unsqueeze(-1)
        self.rows, self.problem = rows, problem._replace(A=rows[:, :p], G=rows[:, p:])
        squares = rows.square()
        lengths = squares.sum(-1).unsqueeze(1)
        self.lengths = torch.where(lengths > 0, lengths, 1.0)
        self.size = _size(problem, self.lengths.squeeze(1).sqrt())
        diagonal = problem.P.diagonal(dim1=-2, dim2=-1).unsqueeze(1)
        unit = diagonal.mean(-1, keepdim=True)
        if not bool((unit > 0).all()):
            push = problem.q.abs().amax(-1).view(-1, 1, 1) / self.size
            unit = torch.where(unit > 0, unit, torch.where(push > 0, push, 1.0))
        self.scale = diagonal.abs() + unit * (self.lengths.reciprocal() @ squares + 1e-3)
        along = product(self.scale.reciprocal(), squares.mT)
        self.unit, self.row_scale = unit, torch.where(along > 0, along.reciprocal(), 0.0)
        damping = _DAMPING * self.scale.squeeze(1)
        self.base = problem.P.expand(max(problem.P.shape[0], damping.shape[0]), -1, -1).clone()
        self.base.diagonal(dim1=-2, dim2=-1).add_(damping)
        if p:
            weighted = self.problem.A * (PENALTY * self.row_scale[..., :p]).mT
            self.base = torch.baddbmm(*_align(self.base, weighted.mT, self.problem.A))

    def take(self, index: Tensor) -> NormalEquations:
        """The elements ``index`` of the batch, for `factorize` and `solve`: the sizes that only a start needs are left behind."""
        new, p = object.__new__(NormalEquations), self.problem.A.shape[1]
        for name in ("rows", "scale", "row_scale", "base"):
            setattr(new, name, take(getattr(self, name), index))
        P, q, _, h, _, b, lb, ub = self.problem
        new.problem = DenseQP(
            take(P, index), q[index], new.rows[:, p:], h[index], new.rows[:, :p], b[index], take(lb, index), take(ub, index)
        )
        return new

    def factorize(self, weights: Tensor, diagonal: Tensor | None) -> Tensor:
        """Lower Cholesky factors of K for inequality weights ``(B, 1, m)`` and bound weights ``(B, 1, n)``.

        Returns:
            ``(B, n, n)``, or ``(1, n, n)`` if there are no inequalities and the batch shares the rest.
        """
        matrix = self.base
        p = self.problem.A.shape[1]
        if weights.shape[-1]:
            rows = self.rows[:, p:]
            matrix = torch.baddbmm(*_align(matrix, rows.mT, rows * weights.mT))
        if diagonal is not None:
            matrix = matrix.expand(diagonal.shape[0], -1, -1).clone() if matrix is self.base else matrix
            matrix.diagonal(dim1=-2, dim2=-1).add_(diagonal.squeeze(1))
        return stable_cholesky(matrix.clone() if matrix is self.base else matrix)

    @staticmethod
    def solve(factor: Tensor, vectors: Tensor) -> Tensor:
        """Solve ``K x = r`` for rows ``(B, R, n)``; two triangular solves, as `cholesky_solve` costs twice as much on batches."""
        right = vectors.mT if factor.shape[0] > 1 or vectors.shape[0] == 1 else vectors.reshape(1, -1, vectors.shape[-1]).mT
        half = torch.linalg.solve_triangular(factor, right, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT.reshape(vectors.shape)


class SaddleFactor:
    """Solves K Δx + Aᵀ Δy = force, A Δx = −r_y with the Cholesky factor L of K and the Schur complement YᵀY, Y = L⁻¹Aᵀ.

    Args:
        lower: ``(B, n, n)`` the factor L.
        A: ``(B or 1, p, n)``.
    """

    def __init__(self, lower: Tensor, A: Tensor) -> None:
        self.lower, self.equalities = lower, A.shape[1]
        if self.equalities:
            self.half = torch.linalg.solve_triangular(lower, A.mT, upper=False)
            self.schur = stable_cholesky(self.half.mT @ self.half, _SCHUR_DAMPING)

    def solve(self, force: Tensor, r_y: Tensor) -> tuple[Tensor, Tensor]:
        """Δx ``(B, 1, n)`` and Δy ``(B, 1, p)``."""
        half, dy = torch.linalg.solve_triangular(self.lower, force.mT, upper=False), r_y
        if self.equalities:
            dy = NormalEquations.solve(self.schur, half.mT @ self.half + r_y)
            half = half - self.half @ dy.mT
        return torch.linalg.solve_triangular(self.lower.mT, half, upper=True).mT, dy


def _align(*matrices: Tensor) -> list[Tensor]:
    batch = max(matrix.shape[0] for matrix in matrices)
    return [matrix.expand(batch, -1, -1) for matrix in matrices]


def _size(problem: DenseQP, norms: Tensor) -> Tensor:
    ones = torch.ones_like(problem.q)
    p = problem.A.shape[1]
    pairs = [(problem.b, norms[:, :p]), (problem.h, norms[:, p:]), (problem.lb, ones), (problem.ub, ones)]
    distances = [torch.where(value.isinf(), 0.0, value).abs() / norm for value, norm in pairs if value is not None and value.shape[-1]]
    size = _largest(*distances) if distances else ones[:, 0]
    return torch.where(size > 0, size, 1.0).view(-1, 1, 1)


def _stack(A: Tensor, G: Tensor) -> Tensor:
    if A.shape[1] == 0 or G.shape[1] == 0:
        return G if A.shape[1] == 0 else A
    batch = max(A.shape[0], G.shape[0])
    return torch.cat((A.expand(batch, -1, -1), G.expand(batch, -1, -1)), 1)
