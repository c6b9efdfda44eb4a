r"""The linear system of an active set: exact solutions of a QP, and of its derivatives, with one Cholesky factor.

For :math:`\min \tfrac12 x^\top P x + q^\top x` subject to :math:`Ax = b` and :math:`Cx \le d`, where C stacks G, −I and I, and d stacks
h, −l and u, the optimality conditions are linear once it is known which rows of :math:`Cx \le d` are active:

.. math:: F = (Px + q + A^\top y + C^\top z,\; Ax - b,\; (Cx - d)_{\text{active}},\; z_{\text{inactive}}) = 0.

After the inactive multipliers are eliminated, the Jacobian J of F and its transpose share the symmetric core

.. math:: \begin{pmatrix} P & E^\top \\ E & 0 \end{pmatrix} \begin{pmatrix} x \\ \lambda \end{pmatrix} =
   \begin{pmatrix} r \\ e \end{pmatrix}, \qquad E = \text{the rows of } A \text{ and the active rows of } C,

which the proximal method of multipliers solves: with :math:`K = P + \delta + E^\top W E`, small δ and large W,

.. math:: K\,\Delta x = r - Px - E^\top\lambda + E^\top W (e - Ex), \qquad \Delta\lambda = W (E\Delta x + Ex - e)

contracts to the nearest solution by a factor of about 1e-6 a step, also where P or E lose rank. A variable at an active bound is
fixed first, and its multiplier read off last. Where the steps do not contract (dependent rows with contradicting right-hand sides, or
a condition beyond about 1e10) the pseudoinverse of the core gives the least-squares solution of least norm.

References:
    R. T. Rockafellar, Augmented Lagrangians and applications of the proximal point algorithm, Math. Oper. Res. 1 (1976).
    S. Wright, Primal-dual interior-point methods, SIAM (1997), chapter 7, for the finite termination by an active set.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .normal_equations import PENALTY, DenseQP, KKTPoint, MaybeTensor, NormalEquations, each, product, take

__all__ = ["ActiveSetFactor", "DenseQP", "KKTPoint", "polish"]

PINNED = 1e30  # weight that fixes a variable: its column of the factor vanishes in floating point
_SWEEPS = 3  # enough for all but ill-conditioned systems: the residual is not measured before
_REFINEMENTS = 9  # sweeps after those, as long as they gain
_ACCURACY = 1e-13  # relative residual at which refinement has nothing left to gain
_CONVERGED = 1e-12  # a larger residual after refinement calls for the pseudoinverse
_SINGULAR = 1e-8  # a residual that stays above says that the system has no solution
_FLOOR = 1e-6  # size of the terms below which a solution may as well be zero
_IDLE = 1e-3  # share of the forces of a curvature of natural size that forces are not measured below
_RANK = 1e-13  # eigenvalues below, relative to the largest, count as zero


def polish(
    equations: NormalEquations, x: Tensor, y: Tensor, z: Tensor, active: Tensor, fixed: Tensor | None = None, *, rescue: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, ActiveSetFactor]:
    """Solve the optimality conditions with the inequalities ``active`` as equations, from a point nearby.

    Args:
        equations: the normal equations of the problem.
        x: ``(B, 1, n)``.
        y: ``(B, 1, p)``.
        z: ``(B, 1, m)`` or, with bounds, ``(B, 1, m + 2n)``: the multipliers of G, of the lower and of the upper bounds.
        active: bool, of the shape of z, never both bounds of a variable.
        fixed: ``(B, 1, n)`` bool, variables whose bounds are equal: the sign of the multiplier chooses between them.
        rescue: allow the pseudoinverse.

    Returns:
        x, y, z (of any sign in the active rows), ``(B, 1)`` the relative residual of the equations, and the factor.
    """
    problem = equations.problem
    n, m, p = x.shape[-1], problem.G.shape[1], y.shape[-1]
    rows = active[..., :m]
    lower: MaybeTensor = None
    upper: MaybeTensor = None
    if problem.lb is not None and problem.ub is not None:
        lower, upper = active[..., m : m + n], active[..., m + n :]
        lower = lower if fixed is None else lower | fixed
        upper = upper & ~lower
        x = torch.where(lower, problem.lb.unsqueeze(1), torch.where(upper, problem.ub.unsqueeze(1), x))
    factor = ActiveSetFactor(problem, *each(lambda t: t.squeeze(1), (rows, lower, upper)), equations=equations)
    target = torch.cat((problem.b.unsqueeze(1), torch.where(rows, problem.h.unsqueeze(1), 0.0)), -1)
    multipliers = torch.cat((y, z[..., :m] * rows), -1)
    x, multipliers, residual, price = factor.refine(-problem.q.unsqueeze(1), target, x, multipliers, rescue=rescue, floor=_FLOOR)
    z = multipliers[..., p:]
    if lower is not None:
        if fixed is not None:
            pushed_up = fixed & (price > 0)
            lower, upper = lower & ~pushed_up, upper | pushed_up
            factor.active_lower, factor.active_upper = lower.squeeze(1), upper.squeeze(1)
        z = torch.cat((z, -price * lower, price * upper), -1)
    return x, multipliers[..., :p], z, residual, factor


class ActiveSetFactor:
    """Factor of the active-set system of a batch of QPs; solves with the Jacobian of F and with its transpose.

    Args:
        problem: the batch.
        active: ``(B, m)`` bool, the active rows of G.
        active_lower: ``(B, n)`` bool, variables at their lower bound; None without bounds.
        active_upper: ``(B, n)`` bool, variables at their upper bound, never together with ``active_lower``.
        equations: the normal equations of ``problem``, where the caller has them.

    Example:
        >>> import torch
        >>> eye, one = torch.eye(2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        >>> qp = DenseQP(eye[None], -2 * eye[:1], eye.sum(0).view(1, 1, 2), one, eye[None, :0], one[:, :0])
        >>> factor = ActiveSetFactor(qp, torch.tensor([[True]]))
        >>> step, residual = factor.solve(KKTPoint(-qp.q, qp.b, qp.h))  # the minimizer on the line x₁ + x₂ = 1
        >>> step.x.round(decimals=6).tolist(), bool(residual < 1e-12)
        ([[1.5, -0.5]], True)
    """

    def __init__(
        self,
        problem: DenseQP,
        active: Tensor,
        active_lower: MaybeTensor = None,
        active_upper: MaybeTensor = None,
        *,
        equations: NormalEquations | None = None,
    ) -> None:
        self.problem = problem
        self.active, self.active_lower, self.active_upper = active, active_lower, active_upper
        self.equations = NormalEquations(problem) if equations is None else equations
        row_scale, p = self.equations.row_scale, problem.A.shape[1]
        self._pinned = None if active_lower is None or active_upper is None else (active_lower | active_upper).unsqueeze(1)
        mask = torch.cat((active.new_ones(active.shape[0], 1, p), active.unsqueeze(1)), -1)
        self._weights = PENALTY * row_scale * mask
        diagonal = None if self._pinned is None else PINNED * self.equations.scale * self._pinned
        self._factor = self.equations.factorize(self._weights[..., p:], diagonal)
        self._pseudoinverse: tuple[Tensor, Tensor, Tensor] | None = None

    def insert(self, index: Tensor, other: ActiveSetFactor, chosen: Tensor) -> None:
        """Overwrite the elements ``index`` by the elements ``chosen`` of ``other``, a factor of the same problems."""
        if self._factor.shape[0] < self.active.shape[0]:
            self._factor = self._factor.expand(self.active.shape[0], -1, -1).clone()
        for name in ("active", "active_lower", "active_upper", "_pinned", "_weights", "_factor"):
            if getattr(self, name) is not None:
                getattr(self, name)[index] = getattr(other, name)[chosen]
        self._pseudoinverse = None

    def blank(self, equations: NormalEquations) -> ActiveSetFactor:
        """An empty factor of the batch of ``equations``, for `insert`."""
        new = copy.copy(self)
        batch, n = equations.problem.q.shape
        new.problem, new.equations, new._pseudoinverse = equations.problem, equations, None
        for name in ("active", "active_lower", "active_upper", "_pinned", "_weights"):
            value = getattr(self, name)
            setattr(new, name, None if value is None else value.new_zeros(batch, *value.shape[1:]))
        new._factor = self._factor.new_zeros(batch, n, n)
        return new

    def take(self, index: Tensor) -> ActiveSetFactor:
        """The factor of the elements ``index`` alone."""
        new = copy.copy(self)
        new.problem, new.equations, new._pseudoinverse = self.problem.take(index), self.equations.take(index), None
        new.active, new.active_lower, new.active_upper = (take(t, index) for t in (self.active, self.active_lower, self.active_upper))
        new._pinned, new._weights = each(lambda t: t[index], (self._pinned, self._weights))
        new._factor = take(self._factor, index)
        return new

    def solve(self, rhs: KKTPoint, *, transpose: bool = False) -> tuple[KKTPoint, Tensor]:
        """Solve ``J w = rhs``, or ``Jᵀ w = rhs``, J being the derivative of F in (x, y, z, z_lower, z_upper).

        F's rows of the inequalities are Gx − h, lb − x and x − ub where active, and the multiplier itself where not.

        Args:
            rhs: blocks ``(B, ·)`` or, for R right-hand sides at once, ``(R, B, ·)``.
            transpose: solve with the transpose.

        Returns:
            The solution, and ``(*R, B)`` its residual relative to the terms that the equations add up. A residual that is not small
            says that J is singular and this right-hand side inconsistent; the solution is then a least-squares one of least norm.
        """
        single = rhs.x.dim() == 2
        force, y, z, lower, upper = each(lambda t: t.unsqueeze(1) if single else t.movedim(0, 1), rhs)
        active = self.active.unsqueeze(1)
        target = torch.cat((y, z * active), -1)
        w_z = z * ~active
        start = torch.zeros_like(force)
        if not transpose:  # the given inactive multipliers load the stationarity rows
            force = force - product(w_z, self.problem.G)
        if self._pinned is not None:
            on_lower, on_upper = self.active_lower.unsqueeze(1), self.active_upper.unsqueeze(1)
            start = torch.where(on_lower, -lower, torch.where(on_upper, upper, start))
            if not transpose:
                force = force + lower * ~on_lower - upper * ~on_upper
        w_x, multipliers, residual, price = self.refine(force, target, start, torch.zeros_like(target))
        p = y.shape[-1]
        w_y, w_z = multipliers[..., :p], w_z + multipliers[..., p:]
        if transpose:
            w_z = w_z - product(w_x, self.problem.G.mT) * ~active
        w_lower = w_upper = None
        if self._pinned is not None:
            w_lower = torch.where(on_lower, -price, lower + w_x if transpose else lower)
            w_upper = torch.where(on_upper, price, upper - w_x if transpose else upper)
        blocks = (w_x, w_y, w_z, w_lower, w_upper)
        solution = KKTPoint(*each(lambda t: t.squeeze(1) if single else t.movedim(1, 0), blocks))
        return solution, residual.squeeze(1) if single else residual.mT

    def refine(
        self, force: Tensor, target: Tensor, x: Tensor, multipliers: Tensor, *, rescue: bool = True, floor: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Go from ``x``, whose pinned entries are right, to P x + Eᵀλ = force in the free entries and E x = target in the active rows.

        Args:
            force: ``(B, R, n)``.
            target: ``(B, R, p + m)``; entries of inactive rows are not read.
            x: ``(B, R, n)``.
            multipliers: ``(B, R, p + m)``, zero in inactive rows.
            rescue: take the pseudoinverse where the refinement stalls.
            floor: terms smaller than this count as this large in the residual.

        Returns:
            x, the multipliers, ``(B, R)`` the relative residual, and what is left of the stationarity rows: the price of the pinned.
        """
        rows, weights = self.equations.rows, self._weights
        best: Any = None
        for sweep in range(_SWEEPS + _REFINEMENTS):
            curve, pull, gap_rows = product(x, self.problem.P), product(multipliers, rows), target - product(x, rows.mT)
            gap_x = force - curve - pull
            if sweep >= _SWEEPS:
                current = (x, multipliers, self._residual((force, curve, pull), target, x, gap_x, gap_rows, floor), gap_x)
                if best is None:
                    best = current
                else:
                    better = current[2] < 0.7 * best[2]
                    best = tuple(_select(better, new, old) for new, old in zip(current, best, strict=True))
                    if not bool(better.any()):
                        break
                if not bool((best[2] > _ACCURACY).any()):
                    break
            load = product(weights * gap_rows, rows) + gap_x
            dx = NormalEquations.solve(self._factor, load if self._pinned is None else load * ~self._pinned)
            x, multipliers = x + dx, multipliers + weights * (product(dx, rows.mT) - gap_rows)
        if rescue:
            poor = (~(best[2] <= _CONVERGED)).any(-1).nonzero().squeeze(-1)
            if poor.numel():
                best = self._rescue(force, target, best, poor)
        x, multipliers, residual, price = best
        return x, multipliers, residual, price

    def _residual(
        self, forces: tuple[Tensor, ...], target: Tensor, x: Tensor, gap_x: Tensor, gap_rows: Tensor, floor: float = 0.0
    ) -> Tensor:
        """The largest error of an equation over the largest term of its block, ``(B, R)``; rows are measured in the metric of the scale."""
        free = gap_x if self._pinned is None else gap_x * ~self._pinned
        # Where nothing pushes, as in the multipliers of a linear program, rounding is measured by what its curvature would be.
        size = torch.maximum(torch.stack(forces).abs().amax((0, -1)), _IDLE * (x.abs() * self.equations.scale).amax(-1))
        residual = _ratio(free.abs().amax(-1), size.clamp(min=floor))
        if target.shape[-1] == 0:
            return residual
        metric = self._weights.sqrt()
        # eᵀx can cancel, and at a vertex x itself: take the size of its factors, or of the x that the forces would move to.
        scale = self.equations.scale
        reach = torch.maximum(((x.square() + floor**2) * scale).sum(-1), (forces[0].square() / scale).sum(-1))
        reach = (PENALTY * reach).sqrt()
        return torch.maximum(residual, _ratio((gap_rows * metric).abs().amax(-1), torch.maximum((target * metric).abs().amax(-1), reach)))

    def _rescue(self, force: Tensor, target: Tensor, best: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
        """Replace the elements ``index`` by their least-squares solution of least norm, unless the refined one is a solution and nearer."""
        if self._pseudoinverse is None or not torch.equal(self._pseudoinverse[0], index):
            self._pseudoinverse = (index, *self.take(index)._invert())
        scaling, inverse = self._pseudoinverse[1:]
        part, n = self.take(index), force.shape[-1]
        force, target, rows = force[index], target[index], part.equations.rows
        refined = tuple(t[index] for t in best)
        x = torch.zeros_like(refined[0]) if part._pinned is None else refined[0] * part._pinned
        multipliers = torch.zeros_like(refined[1])
        found = (*refined[:2], torch.full_like(refined[2], torch.inf), refined[3])
        for sweep in range(4):
            curve, pull = product(x, part.problem.P), product(multipliers, rows)
            gap_x, gap_rows = force - curve - pull, (target - product(x, rows.mT)) * (part._weights > 0)
            if sweep:
                current = (x, multipliers, part._residual((force, curve, pull), target, x, gap_x, gap_rows), gap_x)
                better = current[2] < found[2]
                found = tuple(_select(better, new, old) for new, old in zip(current, found, strict=True))
            free = gap_x if part._pinned is None else gap_x * ~part._pinned
            step = (torch.cat((free, gap_rows), -1) * scaling) @ inverse * scaling
            x, multipliers = x + step[..., :n], multipliers + step[..., n:]
        chosen = ~(refined[2] <= found[2]) | (found[2] > _SINGULAR)
        parts = (_select(chosen, new, old) for new, old in zip(found, refined, strict=True))
        return tuple(whole.index_copy(0, index, part) for whole, part in zip(best, parts, strict=True))

    def _invert(self) -> tuple[Tensor, Tensor]:
        """A scaling of the core, with unit rows in place of what is inactive or pinned, to unit rows, and the pseudoinverse of that."""
        batch, n = self.problem.q.shape
        active = (self._weights > 0).mT
        rows = self.equations.rows * active
        free = active.new_ones(batch, n, 1) if self._pinned is None else ~self._pinned.mT
        keep = torch.cat((free, active), 1)
        matrix = rows.new_zeros(batch, keep.shape[1], keep.shape[1])
        matrix[:, :n, :n], matrix[:, n:, :n], matrix[:, :n, n:] = self.problem.P, rows, rows.mT
        matrix = matrix * keep * keep.mT + torch.diag_embed((~keep).squeeze(-1).to(rows.dtype))
        scaling = matrix.new_ones(batch, 1, keep.shape[1])
        for _ in range(4):
            largest = (matrix * scaling * scaling.mT).abs().amax(1, keepdim=True)
            scaling = scaling / torch.where(largest > 0, largest, 1.0).sqrt()
        values, vectors = torch.linalg.eigh(matrix * scaling * scaling.mT)
        kept = values.abs() > _RANK * values.abs().amax(-1, keepdim=True)
        return scaling, (vectors * torch.where(kept, values.reciprocal(), 0.0).unsqueeze(1)) @ vectors.mT


def _select(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(-1) if new.dim() > mask.dim() else mask, new, old)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 / 0 = 0."""
    return torch.where(part > 0, part / whole, part)
