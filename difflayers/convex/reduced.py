r"""The reduced system of an active set: the derivative of a regular solution by two small Cholesky factors.

Where P is positive definite and the active rows E are independent, the core of the Jacobian (see `active_set`),

.. math:: \begin{pmatrix} P & E^\top \\ E & 0 \end{pmatrix} \begin{pmatrix} x \\ \lambda \end{pmatrix} =
   \begin{pmatrix} r \\ e \end{pmatrix},

is eliminated to the multipliers of the k active rows, :math:`P = LL^\top`, :math:`Y = L^{-1}E^\top`, :math:`v = L^{-1}r`:

.. math:: (Y^\top Y)\,\lambda = Y^\top v - e, \qquad L^\top x = v - Y\lambda.

Only active rows enter, so it costs less than the normal equations, and a factor of a shared P is made once. The rows of the
batch are padded with zeros to the largest k. A step of iterative refinement follows where it gains; what it leaves is measured, and the
caller has the normal equations for what is not good enough.

Where the whole Jacobian is tiny it is factorized as it is.

Reference: J. Nocedal, S. Wright, Numerical Optimization (2006), section 16.2, the Schur-complement method.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .normal_equations import DenseQP, product

__all__ = ["ReducedFactor", "TinyFactor"]

_ACCURACY = 1e-13  # relative residual at which refinement has nothing left to gain
_REFINEMENTS = 2


class TinyFactor:
    """J itself, for problems so small that one call of LAPACK costs less than the handling of blocks; arguments as in `ReducedFactor`.

    Example:
        >>> import torch
        >>> eye, one = torch.eye(2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        >>> qp = DenseQP(eye[None], -2 * eye[:1], eye.sum(0).view(1, 1, 2), one, eye[None, :0], one[:, :0])
        >>> factor = TinyFactor(qp, torch.tensor([[True]]))
        >>> step, residual = factor.solve(torch.cat((-qp.q, qp.h), -1))
        >>> step.round(decimals=6).tolist(), bool(residual < 1e-12)
        ([[1.5, -0.5, 0.5]], True)
    """

    def __init__(self, problem: DenseQP, active: Tensor) -> None:
        P, A, G, held = (t.detach().numpy() for t in (problem.P, problem.A, problem.G, active))
        (batch, rows), n = held.shape, P.shape[-1]
        p, m = A.shape[1], G.shape[1]
        J = np.zeros((batch, n + rows, n + rows))
        J[:, :n, :n] = P
        for matrix, first in ((A, n), (G, n + p)):
            J[:, first : first + matrix.shape[1], :n] = matrix
            J[:, :n, first : first + matrix.shape[1]] = matrix.swapaxes(1, 2)
        if rows > p + m:
            J[:, n + p + m :, :n] = J[:, :n, n + p + m :] = np.eye(n)
        J[:, n:, :n] *= held[:, :, None]
        inactive = np.arange(n, n + rows)
        J[:, inactive, inactive] = ~held
        self._matrix = J

    def solve(self, rhs: Tensor, *, transpose: bool = False) -> tuple[Tensor, Tensor]:
        """As `ReducedFactor.solve`; a singular J has an infinite residual.

        Args:
            rhs: ``(*R, B, n + p + m + n)``.
            transpose: solve with the transpose.
        """
        matrix = self._matrix.swapaxes(1, 2) if transpose else self._matrix
        given = rhs.detach().numpy()
        try:
            solution = np.linalg.solve(matrix, given[..., None])[..., 0]
        except np.linalg.LinAlgError:
            return torch.zeros_like(rhs), rhs.new_full(rhs.shape[:-1], torch.inf)
        gap = np.abs(np.matmul(matrix, solution[..., None])[..., 0] - given).max(-1)
        size = np.abs(matrix).max((1, 2)) * np.abs(solution).max(-1) + np.abs(given).max(-1)
        return torch.from_numpy(solution), torch.from_numpy(gap / np.where(size > 0, size, 1.0))


class ReducedFactor:
    """Factor of the active-set system of regular elements; solves with the Jacobian J of F and with its transpose.

    Args:
        problem: the batch; P positive definite.
        active: ``(B, p + m + n)`` bool, or without bounds ``(B, p + m)``: the rows of A (all true), of G, and the bounds.

    Example:
        >>> import torch
        >>> eye, one = torch.eye(2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        >>> qp = DenseQP(eye[None], -2 * eye[:1], eye.sum(0).view(1, 1, 2), one, eye[None, :0], one[:, :0])
        >>> factor = ReducedFactor(qp, torch.tensor([[True]]))
        >>> step, residual = factor.solve(torch.cat((-qp.q, qp.h), -1))  # the minimizer on the line x₁ + x₂ = 1
        >>> step.round(decimals=6).tolist(), bool(residual < 1e-12)
        ([[1.5, -0.5, 0.5]], True)
    """

    def __init__(self, problem: DenseQP, active: Tensor) -> None:
        self.problem, self.active = problem, active
        batch, n = problem.q.shape
        self._lower = torch.linalg.cholesky_ex(problem.P)[0]
        element, row = active.nonzero(as_tuple=True)
        counts = active.sum(-1)
        place = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[element]
        largest = int(counts.max()) if batch else 0
        self._where = (element, place, row)
        self._rows = problem.q.new_zeros(batch, largest, n)
        p, m = problem.A.shape[1], problem.G.shape[1]
        for matrix, first in ((problem.A, 0), (problem.G, p)):
            if matrix.shape[1]:
                mine = (row >= first) & (row < first + matrix.shape[1])
                e, k, r = element[mine], place[mine], row[mine] - first
                self._rows[e, k] = matrix[e if matrix.shape[0] > 1 else 0, r]
        if active.shape[1] > p + m:
            mine = row >= p + m
            self._rows[element[mine], place[mine], row[mine] - p - m] = 1.0
        self._length = torch.linalg.vector_norm(self._rows, dim=(-2, -1)).unsqueeze(-1)
        self._half = _triangular(self._lower, self._rows)
        schur = self._half @ self._half.mT
        padding = torch.arange(largest, device=row.device) >= counts.unsqueeze(-1)
        schur.diagonal(dim1=-2, dim2=-1).add_(padding)
        self._schur = torch.linalg.cholesky_ex(schur)[0]

    def solve(self, rhs: Tensor, *, transpose: bool = False) -> tuple[Tensor, Tensor]:
        """Solve ``J w = rhs``, or ``Jᵀ w = rhs``.

        Args:
            rhs: ``(*R, B, n + p + m + n)`` (without bounds: ``n + p + m``), in the order of the unknowns x, y, z and z_box.
            transpose: solve with the transpose.

        Returns:
            The solution, and ``(*R, B)`` its residual relative to the terms that the equations add up.
        """
        single = rhs.dim() == 2
        rhs = rhs.unsqueeze(1) if single else rhs.movedim(0, 1)
        n = self.problem.q.shape[1]
        given, target = rhs[..., :n], rhs[..., n:]
        active = self.active.unsqueeze(1)
        loose = target * ~active
        force = given if transpose else given - self._pull(loose)
        e = self._gather(target)
        x, multipliers = self._step(force, e)
        residual, gap_x, gap_e = self._residual(force, e, x, multipliers)
        for _ in range(_REFINEMENTS):
            if not bool((residual > _ACCURACY).any()):
                break
            dx, dm = self._step(gap_x, gap_e)
            x, multipliers = x + dx, multipliers + dm
            residual, gap_x, gap_e = self._residual(force, e, x, multipliers)
        rest = loose + self._scatter(multipliers, target)
        if transpose:
            rest = rest - self._values(x) * ~active
        solution = torch.cat((x, rest), -1)
        return (solution.squeeze(1), residual.squeeze(1)) if single else (solution.movedim(1, 0), residual.mT)

    def _step(self, force: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        v = _triangular(self._lower, force)
        if e.shape[-1]:
            load = _triangular(self._schur, v @ self._half.mT - e)
            e = _triangular(self._schur, load, transpose=True)
            v = v - e @ self._half
        return _triangular(self._lower, v, transpose=True), e

    def _residual(self, force: Tensor, e: Tensor, x: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The largest error over the largest term, ``(B, R)``, and the errors of both blocks of equations."""
        curve, pull = product(x, self.problem.P), multipliers @ self._rows
        gap_x, gap_e = force - curve - pull, e - x @ self._rows.mT
        size = torch.stack((curve, pull, force)).abs().amax((0, -1))
        residual = gap_x.abs().amax(-1) / torch.where(size > 0, size, 1.0)
        if e.shape[-1]:
            reach = torch.maximum(e.abs().amax(-1), x.abs().amax(-1) * self._length)
            residual = torch.maximum(residual, gap_e.abs().amax(-1) / torch.where(reach > 0, reach, 1.0))
        return residual, gap_x, gap_e

    def _gather(self, target: Tensor) -> Tensor:
        element, place, row = self._where
        gathered = target.new_zeros(target.shape[0], self._rows.shape[1], target.shape[1])
        gathered[element, place] = target.mT[element, row]
        return gathered.mT

    def _scatter(self, values: Tensor, like: Tensor) -> Tensor:
        element, place, row = self._where
        scattered = like.new_zeros(like.shape[0], like.shape[2], like.shape[1])
        scattered[element, row] = values.mT[element, place]
        return scattered.mT

    def _pull(self, loads: Tensor) -> Tensor:
        """All rows' transposed product, active or not."""
        p, m = self.problem.A.shape[1], self.problem.G.shape[1]
        pull: Any = product(loads[..., p : p + m], self.problem.G) if m else 0.0
        return pull + loads[..., p + m :] if loads.shape[-1] > p + m else pull

    def _values(self, x: Tensor) -> Tensor:
        p, m = self.problem.A.shape[1], self.problem.G.shape[1]
        parts = [x.new_zeros(*x.shape[:-1], p), product(x, self.problem.G.mT)]
        return torch.cat([*parts, *([x] if self.active.shape[1] > p + m else [])], -1)


def _triangular(lower: Tensor, rows: Tensor, *, transpose: bool = False) -> Tensor:
    """L⁻¹ or L⁻ᵀ times each of the rows ``(B, R, n)``; with one L for all of them they are one system, and L is not copied."""
    right = rows.mT if lower.shape[0] > 1 or rows.shape[0] == 1 else rows.reshape(1, -1, rows.shape[-1]).mT
    return torch.linalg.solve_triangular(lower.mT if transpose else lower, right, upper=transpose).mT.reshape(rows.shape)
