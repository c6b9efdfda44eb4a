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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cone_geometry import Spectrum, spectrum
from .cone_structure import Pattern, Structure

__all__ = ["ConeFactor"]

# The shift δ, relative to the largest entry of M: it moves singular values above √ε nowhere, and conditions the others.
_SHIFT = 1e-9
# A pivot below this share of the largest one may be nothing but the shift.
_REGULAR = 1e-6
_REFINEMENTS = 6
_ENOUGH = 1e-14
_NEARLY_ENOUGH = 1e-12
# Where a system is larger than this and mostly zeros, it is factorized as a sparse matrix.
_DENSE_LIMIT = 250
_DENSE_FROM = 0.15
# Entries of the dense systems of one chunk of the batch.
_CHUNK = 4_000_000


class ConeFactor:
    """The factor at the rows ``v`` ``(batch, m)``, with the projections ``s``, of programs with the flat arguments ``theta``."""

    def __init__(self, structure: Structure, v: Tensor, s: Tensor, theta: Sequence[Any]) -> None:
        self.structure = structure
        self.P, _, self.A, _ = theta
        self.spectrum = spectrum(structure.cones, v, s)
        self.complement = 1 - self.spectrum.eigenvalues
        self.root = self.complement.sqrt()
        self.system = _Chunks(_Parts(structure, self.P, self.A, self.root, self.spectrum))

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

    @property
    def regular(self) -> bool:
        """Whether the systems are regular; only then does refinement with this factor say what the system nearby has for a solution."""
        return self.system.regular

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


class _Parts(NamedTuple):
    """What M is made of: the structure, the values of P and A, the square roots of C, and the spectrum."""

    structure: Structure
    P: Tensor | None
    A: Tensor
    root: Tensor
    spectrum: Spectrum

    def rows(self, chosen: slice) -> _Parts:
        """Some elements of the batch."""
        bases = [(block, basis[chosen]) for block, basis in self.spectrum.bases]
        spectrum = Spectrum(self.spectrum.eigenvalues[chosen], bases)
        return _Parts(self.structure, None if self.P is None else self.P[chosen], self.A[chosen], self.root[chosen], spectrum)


class _Chunks:
    """M of every element, in chunks of the batch that fit into memory."""

    def __init__(self, parts: _Parts) -> None:
        structure, count = parts.structure, len(parts.root)
        kept = int((parts.root > 0).sum(-1).max()) if structure.m and count else 0
        size = structure.n + kept
        entries = (0 if structure.P is None else len(structure.P.rows)) + 2 * len(structure.A.rows)
        sparse = size > _DENSE_LIMIT and entries < _DENSE_FROM * size * size
        # The matrix Ã of all the rows is there for a moment, too.
        step = 1 if sparse else max(1, _CHUNK // max(size * size, structure.n * structure.m, 1))
        self.slices = [slice(i, min(i + step, count)) for i in range(0, count, step)]
        self.systems = [_Sparse(parts.rows(each)) if sparse else _Dense(parts.rows(each), kept) for each in self.slices]

    @property
    def regular(self) -> bool:
        """Whether no element has a pivot that is as small as the shift."""
        return all(system.regular for system in self.systems)

    def solve(self, first: Tensor, second: Tensor, *, transpose: bool, refine: bool) -> tuple[Tensor, ...]:
        """Solve M (x, ν) = (first, second), or with Mᵀ, for rows ``(columns, batch, ...)``; also the relative residuals."""
        solved = [
            system.solve(first[:, each], second[:, each], transpose=transpose, refine=refine)
            for each, system in zip(self.slices, self.systems, strict=True)
        ]
        return solved[0] if len(solved) == 1 else tuple(torch.cat(each, 1) for each in zip(*solved, strict=True))


class _Dense:
    """M as a dense matrix, the rows with λ < 1 gathered in front."""

    def __init__(self, parts: _Parts, kept: int) -> None:
        structure, root = parts.structure, parts.root
        n = structure.n
        self.n = n
        # The rows that stay, one order for each element; what an element does not need decouples, as its √c is zero.
        self.chosen = torch.argsort(root, dim=-1, descending=True, stable=True)[:, :kept]
        matrix = structure.A.dense(parts.A)
        for block, basis in parts.spectrum.bases:
            part = matrix.narrow(-2, block.start, block.count * block.dim).unflatten(-2, (block.count, block.dim))
            part.copy_(basis.mT @ part)
        rows = matrix.gather(-2, self.chosen.unsqueeze(-1).expand(-1, -1, n)) * root.gather(-1, self.chosen).unsqueeze(-1)
        system = matrix.new_zeros(len(matrix), n + kept, n + kept)
        if structure.P is not None and parts.P is not None:
            system[:, :n, :n] = structure.P.dense(parts.P)
        system[:, :n, n:] = -rows.mT
        system[:, n:, :n] = rows
        system[:, n:, n:].diagonal(dim1=-2, dim2=-1).copy_(parts.spectrum.eigenvalues.gather(-1, self.chosen))
        self.system = system
        if n + kept:
            shifted = system.clone()
            largest = system.abs().amax((-2, -1)).clamp(min=1e-300)
            shifted.diagonal(dim1=-2, dim2=-1).add_(_SHIFT * largest.unsqueeze(-1))
            system = shifted
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(system)
        pivots = self.lu.diagonal(dim1=-2, dim2=-1).abs()
        self.regular = bool((pivots > _REGULAR * pivots.amax(-1, keepdim=True)).all()) if n + kept else True

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


class _Sparse:
    """M of one element as a sparse matrix."""

    def __init__(self, parts: _Parts) -> None:
        import scipy.sparse
        import scipy.sparse.linalg

        structure, n = parts.structure, parts.structure.n
        root, eigenvalues = (part[0].cpu().numpy() for part in (parts.root, parts.spectrum.eigenvalues))
        A = _scipy(structure.A, parts.A[0])
        if parts.spectrum.bases:
            A = _block_diagonal(parts.spectrum, structure.m).T @ A
        self.chosen = root.nonzero()[0]
        self.n = n
        rows = scipy.sparse.diags_array(root[self.chosen]) @ A.tocsr()[self.chosen]
        zero = scipy.sparse.csr_array((n, n))
        P = zero if structure.P is None or parts.P is None else _scipy(structure.P, parts.P[0])
        corner = scipy.sparse.diags_array(eigenvalues[self.chosen])
        self.system = scipy.sparse.block_array([[P, -rows.T], [rows, corner]], format="csc")
        shift = _SHIFT * max(abs(self.system).max(), 1e-300)
        # Symmetric but for signs, and nearly definite in the sense of its signs: the diagonal is good enough to pivot on.
        self.lu = scipy.sparse.linalg.splu(
            (self.system + shift * scipy.sparse.eye_array(n + len(self.chosen))).tocsc(),
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0.01,
            options={"SymmetricMode": True},
        )
        pivots = abs(self.lu.U.diagonal())
        self.regular = bool((pivots > _REGULAR * pivots.max()).all())

    def solve(self, first: Tensor, second: Tensor, *, transpose: bool, refine: bool) -> tuple[Tensor, Tensor, Tensor]:
        device, kept = first.device, torch.as_tensor(self.chosen, device=first.device)
        rhs = torch.cat([first, second[..., kept]], -1)[:, 0].mT
        system = self.system.T if transpose else self.system

        def times(z: Tensor) -> Tensor:
            return torch.as_tensor(system @ z[0].cpu().numpy(), device=device).unsqueeze(0)

        def invert(r: Tensor) -> Tensor:
            return torch.as_tensor(self.lu.solve(r[0].cpu().numpy(), "T" if transpose else "N"), device=device).unsqueeze(0)

        solved, residual = _proximal_point(times, invert, rhs[None]) if refine else (invert(rhs[None]), rhs.new_zeros(1, len(first)))
        solved = solved[0].mT.unsqueeze(1)
        unknowns = torch.zeros_like(second)
        unknowns[..., kept] = solved[..., self.n :]
        return solved[..., : self.n], unknowns, residual.T


def _scipy(pattern: Pattern, values: Tensor) -> Any:
    import scipy.sparse

    entries = (values.cpu().numpy(), (pattern.rows.cpu().numpy(), pattern.columns.cpu().numpy()))
    return scipy.sparse.coo_array(entries, shape=pattern.shape).tocsr()


def _block_diagonal(spectrum: Spectrum, size: int) -> Any:
    """Q of one element as a sparse matrix."""
    import scipy.sparse

    parts, start = [], 0
    for block, basis in spectrum.bases:
        parts += [scipy.sparse.eye_array(block.start - start), *basis[0].cpu().numpy()]
        start = block.start + block.count * block.dim
    return scipy.sparse.block_diag([part for part in [*parts, scipy.sparse.eye_array(size - start)] if part.shape[0]], format="csr")


def _proximal_point(times: Callable[[Tensor], Tensor], solve: Callable[[Tensor], Tensor], rhs: Tensor) -> tuple[Tensor, Tensor]:
    """The solution of least norm of M z = rhs, for columns ``(batch, size, columns)``, and each one's relative residual."""
    scale = rhs.norm(dim=-2, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    solved, residual = _refine(times, solve, rhs, scale)
    measure = residual.norm(dim=-2, keepdim=True) / scale
    lost = measure > 2 * _ENOUGH
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
