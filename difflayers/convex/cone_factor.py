r"""One factor of the Jacobian of a conic program for every element, which serves all the derivatives.

With D = Q Λ Qᵀ (:func:`~difflayers.convex.cone_geometry.spectrum`), Ã = Qᵀ A and C = I − Λ, both J and Jᵀ come down to

.. math:: M = \begin{pmatrix} P & -(\sqrt C Ã)^T \\ \sqrt C Ã & Λ \end{pmatrix}

or its transpose: rows with λ = 1 (inactive inequalities, directions that stay inside their cone) leave the system, rows with
λ = 0 are equations, and everything between is bounded by one; nothing is divided by a small number. M is monotone (its
symmetric part is diag(P, Λ) ≥ 0), so that M and Mᵀ have the same kernel, and M + δI is factorized instead: the proximal point iteration

.. math:: (M + δ I) (z_{k+1} - z_k) = r - M z_k

is iterative refinement where M is regular, and converges to the solution of least norm where it is singular and r is in its range.
Otherwise what stays of the residual is the part of r in the kernel; it is taken off, which leaves the least-squares solution,
and is reported.

Reference: Rockafellar, Monotone operators and the proximal point algorithm, SIAM J. Control Optim. 1976.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cone_geometry import Spectrum, spectrum

if TYPE_CHECKING:
    from .cone_program import Structure

__all__ = ["ConeFactor"]

# The shift δ, relative to the largest entry of M: it moves singular values above √ε nowhere, and conditions the others.
_SHIFT = 1e-9
_REFINEMENTS = 6
_ENOUGH = 1e-14
_NEARLY_ENOUGH = 1e-12
# Where a system is larger than this and mostly zeros, it is factorized as a sparse matrix.
_DENSE_LIMIT = 250
# Entries of the dense systems of one chunk of the batch.
_CHUNK = 4_000_000


class ConeFactor:
    """The factor at the rows ``v`` ``(batch, m)``, with the projections ``s``, of programs with the flat arguments ``theta``."""

    def __init__(self, structure: Structure, v: Tensor, s: Tensor, theta: Sequence[Any]) -> None:
        self.structure = structure
        P, _, self.A, _ = theta
        self.P = P
        self.spectrum = spectrum(structure.cones, v, s)
        eigenvalues = self.spectrum.eigenvalues
        self.complement = 1 - eigenvalues
        self.root = self.complement.sqrt()
        kept = int((self.complement > 0).sum(-1).max()) if structure.m else 0
        self.system = _Dense(self, P, kept)

    def solve(self, rhs: Tensor, *, transpose: bool, refine: bool = True) -> tuple[Tensor, Tensor]:
        """Solve J u = rhs or Jᵀ u = rhs for rows ``(*columns, batch, n + m)``; also the relative residual of each."""
        n = self.structure.n
        lead = rhs.shape[:-2]
        rhs = rhs.reshape(-1, *rhs.shape[-2:])
        first, second = rhs[..., :n], self.spectrum.rotate(rhs[..., n:])
        eigenvalues, complement, root = self.spectrum.eigenvalues, self.complement, self.root
        low = complement >= 0.5
        safe = torch.where(low, 1.0, eigenvalues)
        safe_root = torch.where(low, root, 1.0)
        if transpose:
            high = torch.where(low, 0, second / safe)
            first = first - self._times(self.spectrum.rotate(high, back=True), transpose=True)
            x, eta, residual = self.system.solve(first, torch.where(low, second / safe_root, 0), transpose=True, refine=refine)
            w = high + root * eta
        else:
            x, nu, residual = self.system.solve(first, root * second, transpose=False, refine=refine)
            w = torch.where(low, nu / safe_root, (second - self.spectrum.rotate(self._times(x))) / safe)
        solved = torch.cat([x, self.spectrum.rotate(w, back=True)], -1)
        return solved.reshape(*lead, *solved.shape[1:]), residual.reshape(*lead, -1)

    def solve_nearby(self, nearby: Spectrum, rhs: Tensor, *, transpose: bool) -> tuple[Tensor, Tensor]:
        """The same for the Jacobian at another point, of which only the spectrum is known: iterative refinement with this factor."""
        scale = rhs.norm(dim=-1, keepdim=True)
        scale = torch.where(scale > 0, scale, 1.0)
        solved, _ = self.solve(rhs, transpose=transpose, refine=False)
        for _ in range(_REFINEMENTS):
            residual = rhs - self._jacobian(nearby, solved, transpose=transpose)
            measure = residual.norm(dim=-1, keepdim=True) / scale
            if bool((measure <= _NEARLY_ENOUGH).all()):
                break
            step, _ = self.solve(residual, transpose=transpose, refine=False)
            solved = torch.where(measure <= _NEARLY_ENOUGH, solved, solved + step)
        return solved, measure.squeeze(-1)

    def _jacobian(self, at: Spectrum, u: Tensor, *, transpose: bool) -> Tensor:
        n, P = self.structure.n, self.structure.P
        x, w = u[..., :n], u[..., n:]
        curvature = 0 if P is None else P.times(self.P, x)
        if transpose:
            mapped = self._times(x) + w
            mapped = at.rotate(at.eigenvalues * at.rotate(mapped), back=True)
            return torch.cat([curvature + self._times(w, transpose=True), mapped - self._times(x)], -1)
        mapped = at.rotate(at.eigenvalues * at.rotate(w), back=True)
        return torch.cat([curvature + self._times(mapped - w, transpose=True), self._times(x) + mapped], -1)

    def _times(self, rows: Tensor, *, transpose: bool = False) -> Tensor:
        return self.structure.A.times(self.A, rows, transpose=transpose)


class _Dense:
    """M of every element as a dense matrix, the rows with λ < 1 gathered in front."""

    def __init__(self, factor: ConeFactor, P: Tensor | None, kept: int) -> None:
        structure, root = factor.structure, factor.root
        n = structure.n
        self.n, self.m = n, structure.m
        # The rows that stay, one order for each element; what an element does not need decouples, as its √c is zero.
        self.chosen = torch.argsort(root, dim=-1, descending=True, stable=True)[:, :kept]
        matrix = structure.A.dense(factor.A)
        for block, basis in factor.spectrum.bases:
            part = matrix.narrow(-2, block.start, block.count * block.dim).unflatten(-2, (block.count, block.dim))
            part.copy_(basis.mT @ part)
        rows = matrix.gather(-2, self.chosen.unsqueeze(-1).expand(-1, -1, n)) * root.gather(-1, self.chosen).unsqueeze(-1)
        system = matrix.new_zeros(len(matrix), n + kept, n + kept)
        if structure.P is not None and P is not None:
            system[:, :n, :n] = structure.P.dense(P)
        system[:, :n, n:] = -rows.mT
        system[:, n:, :n] = rows
        system[:, n:, n:].diagonal(dim1=-2, dim2=-1).copy_(factor.spectrum.eigenvalues.gather(-1, self.chosen))
        self.system = system
        shift = _SHIFT * system.abs().amax((-2, -1), keepdim=True).clamp(min=1e-300) if n + kept else system.new_ones(len(system), 1, 1)
        shifted = system + shift * torch.eye(n + kept, dtype=system.dtype, device=system.device)
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(shifted)

    def solve(self, first: Tensor, second: Tensor, *, transpose: bool, refine: bool) -> tuple[Tensor, Tensor, Tensor]:
        chosen = self.chosen.expand(len(second), *self.chosen.shape)
        # One system has many right-hand sides: they are the columns of one solve.
        rhs = torch.cat([first, second.gather(-1, chosen)], -1).permute(1, 2, 0)
        system = self.system.mT if transpose else self.system

        def invert(r: Tensor) -> Tensor:
            return torch.linalg.lu_solve(self.lu, self.pivots, r, adjoint=transpose)

        solved, residual = _proximal_point(lambda z: system @ z, invert, rhs) if refine else (invert(rhs), rhs.new_zeros(rhs[:, 0].shape))
        solved = solved.permute(2, 0, 1)
        unknowns = torch.zeros_like(second).scatter(-1, chosen, solved[..., self.n :])
        return solved[..., : self.n], unknowns, residual.T


def _proximal_point(times: Callable[[Tensor], Tensor], solve: Callable[[Tensor], Tensor], rhs: Tensor) -> tuple[Tensor, Tensor]:
    """The solution of least norm of M z = rhs, for columns ``(batch, size, columns)``, and each one's relative residual."""
    scale = rhs.norm(dim=-2, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    solved, residual = _refine(times, solve, rhs, scale)
    measure = residual.norm(dim=-2, keepdim=True) / scale
    lost = measure > 1e-9
    if bool(lost.any()):
        # What refinement does not move is the part in the kernel; without it the system has a solution.
        consistent, _ = _refine(times, solve, rhs - residual, scale)
        solved = torch.where(lost, consistent, solved)
    return solved, measure.squeeze(-2)


def _refine(times: Callable[[Tensor], Tensor], solve: Callable[[Tensor], Tensor], rhs: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    solved = solve(rhs)
    residual = rhs - times(solved)
    for _ in range(_REFINEMENTS):
        size = residual.norm(dim=-2, keepdim=True)
        if bool((size <= _ENOUGH * scale).all()):
            break
        step = solve(residual)
        rest = residual - times(step)
        better = (rest.norm(dim=-2, keepdim=True) < 0.5 * size) & (size > _ENOUGH * scale)
        if not bool(better.any()):
            break
        solved = torch.where(better, solved + step, solved)
        residual = torch.where(better, rest, residual)
    return solved, residual
