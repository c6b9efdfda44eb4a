r"""A sparse quadratic program, how well a point solves it, and the factor of its active set.

With the rows E = (A; G), the optimality conditions of min ½xᵀPx + qᵀx s.t. Ax = b, Gx ≤ h, l ≤ x ≤ u are, once the active rows and
bounds are known, the symmetric system

.. math:: \begin{pmatrix} P & E^\top \\ E & 0 \end{pmatrix} \begin{pmatrix} x \\ \lambda \end{pmatrix} =
   \begin{pmatrix} r \\ e \end{pmatrix}

without the inactive rows and the variables at an active bound (pinned: their values are known and their multipliers are read off last).
Its derivative and the transpose of that have the same core (:mod:`~difflayers.convex.active_set` says how).

The whole matrix is equilibrated once. For one active set the kept part, with δ added to the diagonal of P and −δ to the zero block, is
quasi-definite: it has an LDLᵀ factor for every ordering, which SuperLU computes as LU without pivoting in a minimum-degree
ordering. Refinement in the matrix without δ is the proximal method of multipliers. It converges to the solution nearest to its start, also
where P or E lose rank; where it is slow (curvature near δ), GMRES with the factor as preconditioner goes on.

References:
    R. Vanderbei, Symmetric quasidefinite matrices, SIAM J. Optim. 5 (1995).
    D. Ruiz, A scaling algorithm to equilibrate both rows and columns norms in matrices, RAL-TR-2001-034 (2001).
    X. S. Li, An overview of SuperLU, ACM Trans. Math. Softw. 31 (2005).
"""

from __future__ import annotations

import functools
import hashlib
import threading
from typing import Any, NamedTuple

import numpy as np

__all__ = ["SparseError", "SparseFactor", "SparseKKT", "SparsePoint", "SparseQP", "is_convex", "kkt_error", "stack_rows"]

Array = np.ndarray[Any, Any]
Sparse = Any  # a matrix of scipy.sparse, which is imported only where it is needed

_DELTA = 1e-7  # regularization of the equilibrated core
_LEAST_DELTA = 1e-12
_SCALINGS = 5  # sweeps of the equilibration
_SWEEPS = 12
_ACCURACY = 1e-14  # relative residual at which refinement has nothing left to gain
_CONVERGED = 1e-11  # a larger residual after refinement calls for GMRES
_KRYLOV = 40
_GROWTH = 1e4  # a solution is measured by its own size up to this many times the size of the data
_SIMILAR = 0.05  # share of its unknowns by which an active set may differ from another to take over its ordering
_REMEMBERED = 16

# What a training loop asks for again and again: orderings by pattern, and verdicts on constant P. Both only save time.
_ORDERS: dict[bytes, Array] = {}
_VERDICTS: dict[bytes, bool] = {}
_LOCK = threading.Lock()


class SparseQP(NamedTuple):
    """``min ½xᵀPx + qᵀx  s.t.  Ax = b, Gx ≤ h, lb ≤ x ≤ ub``; P symmetric, matrices in CSR, limits ±inf where there are none."""

    P: Sparse
    q: Array
    G: Sparse
    h: Array
    A: Sparse
    b: Array
    lb: Array
    ub: Array


class SparsePoint(NamedTuple):
    """Primal and dual variables; ``z_box`` is negative at a lower bound and positive at an upper one."""

    x: Array
    y: Array
    z: Array
    z_box: Array


class SparseError(NamedTuple):
    """How far a point is from optimal; ``relative`` is the largest of the three over one plus the size of the terms."""

    primal: float
    dual: float
    gap: float
    relative: float


def largest(*vectors: Array) -> float:
    """The largest entry in size, 0 of none, NaN if there is one."""
    return max((float(np.abs(vector).max()) if np.isfinite(vector).all() else np.nan for vector in vectors if vector.size), default=0.0)


def kkt_error(problem: SparseQP, point: SparsePoint) -> SparseError:
    """Measure the optimality conditions in the data as given; the multipliers must have their signs, and be zero at absent limits."""
    P, q, G, h, A, b, lb, ub = problem
    x, y, z, z_box = point
    with np.errstate(invalid="ignore", over="ignore"):
        curve, pull_y, pull_z = P @ x, A.T @ y, G.T @ z
        gap_rows, over, outside = A @ x - b, np.maximum(G @ x - h, 0), np.maximum(np.maximum(lb - x, x - ub), 0)
        gradient = curve + q + pull_y + pull_z + z_box
        lower, upper = (np.where(np.isinf(side), 0, side) for side in (lb, ub))
        terms = np.array(
            [curve @ x, q @ x, b @ y, np.where(np.isinf(h), 0, h) @ z, lower @ np.minimum(z_box, 0), upper @ np.maximum(z_box, 0)]
        )
        gap, dual = float(abs(terms.sum())), largest(gradient)
        violation = largest(gap_rows / (1 + abs(b)), over / (1 + abs(np.where(np.isinf(h), 0, h))), outside / (1 + abs(x)))
        relative = max(
            violation, dual / (1 + largest(curve, q, pull_y, pull_z, z_box)), gap / (1 + float(abs(terms).max())), key=lambda v: (v != v, v)
        )
    return SparseError(largest(gap_rows, over, outside), dual, gap, relative if np.isfinite(relative) else np.inf)


def stack_rows(*matrices: Sparse) -> Sparse:
    """Matrices on top of each other, in CSR."""
    import scipy.sparse as sp

    return sp.vstack(matrices, format="csr")


def is_convex(P: Sparse, rounding: float) -> bool:
    """Whether P, of finite entries, has no negative eigenvalue beyond their relative rounding."""
    import scipy.sparse as sp

    diagonal = P.diagonal()
    shift = rounding * largest(diagonal)
    if shift == 0:
        return not P.data.any()
    if bool((diagonal + shift < 0).any()):
        return False
    if bool((2 * diagonal + shift >= abs(P).sum(axis=1)).all()):  # diagonally dominant
        return True
    key = hashlib.blake2b(P.data.tobytes() + P.indices.tobytes() + P.indptr.tobytes() + np.float64(shift).tobytes()).digest()
    verdict = _VERDICTS.get(key)
    if verdict is None:
        try:
            factor = _symmetric_lu((P + shift * sp.eye_array(P.shape[0])).tocsc())
            # Without pivoting U = D Lᵀ, and the signs of D are those of the eigenvalues.
            verdict = bool((factor.U.diagonal() > 0).all())
        except RuntimeError:
            verdict = False
        _remember(_VERDICTS, key, verdict)
    return verdict


class SparseKKT:
    """The equilibrated KKT matrix of one problem with all its rows; active sets take parts of it.

    Attributes:
        stiffness: the curvature along each row of G, and along each variable: a constraint whose multiplier is larger than this
            times its slack is more active than not.
    """

    def __init__(self, P: Sparse, G: Sparse, A: Sparse) -> None:
        import scipy.sparse as sp

        self.n, self.p, self.m = P.shape[0], A.shape[0], G.shape[0]
        rows = stack_rows(A, G)
        matrix = sp.block_array([[P, rows.T], [rows, None]], format="coo")
        self.scale = _equilibration(matrix)
        matrix.data = matrix.data * self.scale[matrix.coords[0]] * self.scale[matrix.coords[1]]
        self.matrix = matrix.tocsc()
        self.pattern = hashlib.blake2b(self.matrix.indices.tobytes() + self.matrix.indptr.tobytes()).digest()
        self.stiffness = self.scale[self.n + self.p :] ** 2, 1 / self.scale[: self.n] ** 2

    @functools.cached_property
    def sizes(self) -> Sparse:
        """The entries of the matrix without their signs."""
        return abs(self.matrix)

    def factorize(self, active: Array, pinned: Array) -> SparseFactor:
        """The factor of an active set: bool arrays for the rows of G and for the variables at a bound."""
        return SparseFactor(self, active, pinned)


class SparseFactor:
    """The factor of one active set; solves the core for any right-hand sides.

    Args:
        kkt: the equilibrated matrix.
        active: ``(m,)`` bool, rows of G.
        pinned: ``(n,)`` bool, variables at a bound.
    """

    def __init__(self, kkt: SparseKKT, active: Array, pinned: Array) -> None:
        self.kkt, self.active, self.pinned = kkt, active, pinned
        self.keep = np.concatenate((~pinned, np.ones(kkt.p, bool), active))
        kept = np.flatnonzero(self.keep)
        order = self._known_order()
        self._index = kept if order is None else order
        self._lu = self._factorize(_DELTA, ordered=order is not None)
        if order is None and self._lu is not None:
            _remember(_ORDERS, kkt.pattern, kept[np.argsort(self._lu.perm_c)])

    def _factorize(self, delta: float, *, ordered: bool) -> Any:
        """The factor with δ, or None if there is nothing to factorize or a pivot vanished in rounding."""
        import scipy.sparse as sp

        if not len(self._index):
            return None
        core = self.kkt.matrix[self._index][:, self._index]
        damping = np.where(self._index < self.kkt.n, delta, -delta)
        try:
            return _symmetric_lu((core + sp.dia_array((damping[None], [0]), shape=core.shape)).tocsc(), ordered=ordered)
        except RuntimeError:
            return None

    @functools.cached_property
    def _nearer(self) -> Any:
        """The factor with hardly any regularization, for systems whose curvature is lost in the usual one."""
        return self._factorize(_LEAST_DELTA, ordered=False)

    def _known_order(self) -> Array | None:
        """The ordering of a similar active set of the same pattern; what it lacks comes last. Finding one costs as much as a factor."""
        known = _ORDERS.get(self.kkt.pattern)
        if known is None:
            return None
        missing = self.keep.copy()
        missing[known] = False
        common, new = known[self.keep[known]], np.flatnonzero(missing)
        if len(new) + len(known) - len(common) > _SIMILAR * len(common):
            return None
        return np.concatenate((common, new))

    def refine(self, rhs: Array, start: Array) -> tuple[Array, Array, Array]:
        """Go from ``start`` to the solution of the core nearby.

        Args:
            rhs: ``(n + p + m, R)``; entries of pinned variables and inactive rows are not read.
            start: ``(n + p + m, R)``; entries of pinned variables are right, those of inactive rows are zero.

        Returns:
            The solution, ``(n, R)`` what is left of the stationarity rows (the price of the pinned), and ``(R,)`` the residual
            relative to the size of the terms.
        """
        scale = self.kkt.scale[:, None]
        target, point = rhs * scale, start / scale
        begin = ((self.kkt.sizes @ abs(point) + abs(target)) * self.keep[:, None]).max(0, initial=0.0)
        best, gap, residual = self._measured(target, point, begin)
        for precise in (False, True):
            lu = self._nearer if precise else self._lu
            for _ in range(_SWEEPS if lu is not None else 0):
                if not (residual > _ACCURACY).any():
                    break
                point = best.copy()
                point[self._index] += lu.solve(gap[self._index])
                point, new_gap, new_residual = self._measured(target, point, begin)
                better = new_residual < 0.5 * residual
                best, gap = np.where(better, point, best), np.where(better, new_gap, gap)
                residual = np.where(better, new_residual, residual)
                if not better.any():
                    break
            if not (residual > _CONVERGED).any():
                break
        for column in np.flatnonzero(residual > _CONVERGED) if self._lu is not None else ():
            part = best[:, column], gap[:, column], float(residual[column])
            best[:, column], gap[:, column], residual[column] = self._accelerate(target[:, column], begin[column], *part)
        price = gap[: self.kkt.n] / scale[: self.kkt.n]
        return best * scale, price, residual

    def _measured(self, target: Array, point: Array, start: Array) -> tuple[Array, Array, Array]:
        """The point, the gap of all equations, and the largest gap of a block over the largest sum of terms in the block.

        ``start`` ``(R,)`` is the largest sum of terms that the refinement began with.
        """
        gap = target - self.kkt.matrix @ point
        terms = (self.kkt.sizes @ abs(point) + abs(target)) * self.keep[:, None]
        errors = abs(gap) * self.keep[:, None]
        n = self.kkt.n
        force = terms[:n].max(0, initial=0.0)
        # At a vertex x may be zero: take what the forces would move.
        reach = np.maximum(terms[n:].max(0, initial=0.0), abs(target[:n]).max(0, initial=0.0))
        # Where the system is inconsistent its iterates grow without limit; their size must not hide that.
        force, reach = np.minimum(force, _GROWTH * start), np.minimum(reach, _GROWTH * start)
        with np.errstate(invalid="ignore", divide="ignore"):
            residual = np.maximum(_ratio(errors[:n].max(0, initial=0.0), force), _ratio(errors[n:].max(0, initial=0.0), reach))
        return point, gap, np.where(np.isfinite(residual), residual, np.inf)

    def _accelerate(self, target: Array, begin: float, point: Array, gap: Array, residual: float) -> tuple[Array, Array, float]:
        from scipy.sparse import linalg

        index, size = self._index, len(self._index)
        operator: Any = linalg.LinearOperator

        def times(part: Array) -> Array:
            whole = np.zeros(len(self.keep))
            whole[index] = part.ravel()
            return (self.kkt.matrix @ whole)[index]

        core = operator((size, size), matvec=times, dtype=np.float64)
        solve = operator((size, size), matvec=lambda part: self._lu.solve(part.ravel()), dtype=np.float64)
        for _ in range(4):
            if not np.isfinite(residual) or residual <= _CONVERGED / 10:
                break
            step, _ = linalg.gmres(core, gap[index], rtol=1e-6, atol=0.0, restart=_KRYLOV, maxiter=1, M=solve)
            moved = point.copy()
            moved[index] += step
            _, new_gap, new_residual = self._measured(target[:, None], moved[:, None], np.array([begin]))
            if not new_residual[0] < 0.9 * residual:
                break
            point, gap, residual = moved, new_gap[:, 0], float(new_residual[0])
        return point, gap, residual


def _symmetric_lu(matrix: Sparse, *, ordered: bool = False) -> Any:
    """SuperLU without pivoting, in a minimum-degree ordering of the symmetric pattern or as it is: LDLᵀ in all but name."""
    from scipy.sparse.linalg import splu

    matrix.indices, matrix.indptr = matrix.indices.astype(np.intc, copy=False), matrix.indptr.astype(np.intc, copy=False)
    ordering = "NATURAL" if ordered else "MMD_AT_PLUS_A"
    return splu(matrix, permc_spec=ordering, diag_pivot_thresh=0.0, options={"SymmetricMode": True})


def _remember(memory: dict[bytes, Any], key: bytes, value: Any) -> None:
    with _LOCK:
        memory[key] = value
        if len(memory) > _REMEMBERED:
            del memory[next(iter(memory))]


def _equilibration(matrix: Sparse) -> Array:
    """A scaling that brings the largest entry of every row and column of a symmetric matrix near one."""
    (i, j), size = matrix.coords, abs(matrix.data)
    scale = np.ones(matrix.shape[0])
    for _ in range(_SCALINGS):
        top = np.zeros_like(scale)
        np.maximum.at(top, i, size * scale[i] * scale[j])
        scale /= np.sqrt(np.where(top > 0, top, 1.0))
    return scale


def _ratio(part: Array, whole: Array) -> Array:
    return np.where(part > 0, part / whole, part)
