"""Sparse QPs beside moreau and OSQP's layer: forward and backward, float64, one thread.

Random problems, model predictive control, the lasso, a support vector machine, a linear program, and bands with 10 000 unknowns; every
stored entry and every vector is a parameter. Beside each time stand two errors: KKT, the largest entry of the optimality conditions at the
returned x and multipliers, in the data as given; and the gradient, relative in each parameter, against an exact reference. The reference
owes a contestant nothing but the guess of an active set: one LU factorization with pivoting of its KKT matrix, whose multipliers and slacks
prove by their signs that the solution is the optimum.

diffcp, which cvxpylayers differentiates with, is not here: its exact adjoints refuse quadratic objectives.

Run as ``python -m benchmarks.sparse_qp``; ``--short`` for a smoke run.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu

from benchmarks.timing import Table, describe_machine, installed, one_thread, race
from difflayers.convex import SparseMatrix, solve_qp

__all__ = ["main"]


class SparseQP(NamedTuple):
    """min ½xᵀPx + qᵀx  s.t.  Gx ≤ h, Ax = b, lb ≤ x ≤ ub; matrices in CSR with sorted entries, P with both triangles."""

    P: Any
    q: Any
    G: Any
    h: Any
    A: Any
    b: Any
    lb: Any
    ub: Any

    @property
    def rows(self) -> tuple[Any, Any]:
        """Equalities, inequalities and the finite bounds as rows of one matrix, and their limits: the form of a conic solver."""
        eye = sp.eye_array(len(self.q), format="csr")
        lower, upper = np.isfinite(self.lb), np.isfinite(self.ub)
        rows = sp.vstack([self.A, self.G, -eye[lower], eye[upper]], format="csr")
        return rows, np.concatenate([self.b, self.h, -self.lb[lower], self.ub[upper]])


class Answer(NamedTuple):
    """x, the multipliers of the rows, and the gradients in P, q, G, h, A, b (entries in the order of the matrix)."""

    x: Any
    multipliers: Any
    gradients: tuple[Any, ...]


def main(*, short: bool = False) -> None:
    """Print the table."""
    one_thread()
    describe_machine(["moreau", "clarabel", "osqp"])
    contestants = {"ours": ours} | {name: run for name, (package, run) in PEERS.items() if installed(package)}
    columns = [("case", 28), ("ours ms", -8), ("KKT", -6), ("gradient", -8)]
    for name in PEERS:
        columns += [(f"{name} ×", -9), ("KKT", -6), ("gradient", -8)]
    table = Table("Sparse QPs, forward + backward", columns)
    for label, qp in cases(short):
        cotangent = np.random.default_rng(0).standard_normal(len(qp.q))
        answers: dict[str, Answer | str] = {name: _attempt(run, qp, cotangent) for name, run in contestants.items()}
        exact = next(
            (found for answer in answers.values() if isinstance(answer, Answer) and (found := reference(qp, cotangent, answer))), None
        )
        runs = {name: functools.partial(contestants[name], qp, cotangent) for name, answer in answers.items() if isinstance(answer, Answer)}
        clock = race(runs, budget=0.1 if short else 5.0, rounds=(1, 2) if short else (2, 20))
        cells: list[object] = [label]
        for name in ("ours", *PEERS):
            answer = answers.get(name, "absent")
            if isinstance(answer, str):
                cells += [answer, None, None]
                continue
            cells.append(1e3 * clock.seconds(name) if name == "ours" else clock.ratio(name, "ours"))
            cells += [kkt_residual(qp, answer), gradient_error(answer, exact) if exact else "no proof"]
        table.row(*cells)


def cases(short: bool) -> list[tuple[str, SparseQP]]:
    """The problems by name."""
    if short:
        return [("random, n 200", random_qp(200, 0.02)), ("control, 10 steps", control(10)), ("bands, n 500", bands(500))]
    return [
        ("random, n 2000, 0.1 %", random_qp(2000, 0.001)),
        ("random, n 2000, 0.2 %", random_qp(2000, 0.002)),
        ("control, 150 steps, n 2400", control(150)),
        ("lasso, 400 features, n 1600", lasso(400)),
        ("svm, 1000 samples, n 1100", support_vectors(100, 1000)),
        ("linear, n 1000", linear(1000)),
        ("bands, n 10000", bands(10000)),
    ]


def random_qp(n: int, density: float) -> SparseQP:
    """P = MMᵀ + 0.1, n inequalities, n / 4 equalities."""
    draw = np.random.default_rng(n)

    def thin(rows: int, columns: Any) -> Any:
        body = sp.random_array((rows, n), density=density, rng=draw, data_sampler=draw.standard_normal)
        return body + sp.csr_array((np.ones(rows), (np.arange(rows), columns)), (rows, n))

    root = sp.random_array((n, n), density=density, rng=draw, data_sampler=draw.standard_normal)
    G, A = thin(n, draw.permutation(n)), thin(n // 4, draw.permutation(n)[: n // 4])
    inside = draw.standard_normal(n)
    return _qp(root @ root.T + 0.1 * sp.eye_array(n), draw.standard_normal(n), G, G @ inside + draw.random(n), A, A @ inside)


def control(steps: int, states: int = 12, inputs: int = 4) -> SparseQP:
    """Linear dynamics from a random start, quadratic costs, bounds on inputs and states."""
    draw = np.random.default_rng(steps)
    move = np.eye(states) + 0.05 * draw.standard_normal((states, states))
    move /= max(1.0, np.abs(np.linalg.eigvals(move)).max())
    push = 0.3 * draw.standard_normal((states, inputs))
    now = sp.kron(sp.eye_array(steps), np.hstack([-push, np.eye(states)]))
    before = sp.kron(sp.eye_array(steps, k=-1), np.hstack([np.zeros((states, inputs)), -move]))
    b = np.zeros(steps * states)
    b[:states] = move @ (2 * draw.standard_normal(states))
    cost = np.tile(np.concatenate([np.full(inputs, 0.1), 0.1 + 5 * draw.random(states)]), steps)
    bound = np.tile(np.concatenate([np.full(inputs, 0.4), np.full(states, 20.0)]), steps)
    q = 0.05 * draw.standard_normal(len(cost))
    return _qp(sp.diags_array(cost), q, None, None, now + before, b, -bound, bound)


def lasso(features: int) -> SparseQP:
    """min ½‖r‖² + λ Σ t over (w, r, t) with Xw − r = y and |w| ≤ t."""
    draw = np.random.default_rng(features)
    samples = 2 * features
    X = sp.random_array((samples, features), density=0.05, rng=draw, data_sampler=draw.standard_normal)
    y = X @ ((draw.random(features) < 0.2) * draw.standard_normal(features)) + 0.1 * draw.standard_normal(samples)
    eye, none = sp.eye_array(features), sp.csr_array((features, samples))
    P = sp.block_diag([sp.csr_array((features, features)), sp.eye_array(samples), sp.csr_array((features, features))])
    A = sp.hstack([X, -sp.eye_array(samples), none.T])
    G = sp.vstack([sp.hstack([eye, none, -eye]), sp.hstack([-eye, none, -eye])])
    weight = 0.06 * np.abs(X.T @ y).max()
    q = np.concatenate([np.zeros(features + samples), np.full(features, weight)])
    return _qp(P, q, G, np.zeros(2 * features), A, y)


def support_vectors(features: int, samples: int) -> SparseQP:
    """min ½‖w‖² + Σ t over (w, t) with y wᵀx ≥ 1 − t and t ≥ 0."""
    draw = np.random.default_rng(features)
    X = sp.random_array((samples, features), density=0.15, rng=draw, data_sampler=draw.standard_normal)
    signs = np.where(draw.random(samples) < 0.5, -1.0, 1.0)
    P = sp.block_diag([sp.eye_array(features), sp.csr_array((samples, samples))])
    G = sp.hstack([-sp.diags_array(signs) @ X, -sp.eye_array(samples)])
    q, lb = (np.concatenate([np.full(features, first), np.full(samples, second)]) for first, second in ((0.0, 1.0), (-np.inf, 0.0)))
    return _qp(P, q, G, -np.ones(samples), None, None, lb)


def linear(n: int) -> SparseQP:
    """A linear program in standard form whose solution is a vertex that is not degenerate."""
    draw, p = np.random.default_rng(n), n // 2
    A = sp.random_array((p, n), density=0.01, rng=draw, data_sampler=draw.standard_normal)
    A = A + sp.csr_array((np.ones(p), (np.arange(p), np.arange(p))), (p, n))
    x, prices = (np.where((np.arange(n) < p) == basic, 0.1 + draw.random(n), 0.0) for basic in (True, False))
    return _qp(sp.csr_array((n, n)), A.T @ draw.standard_normal(p) + prices, None, None, A, A @ x, np.zeros(n))


def bands(n: int) -> SparseQP:
    """Every matrix a few diagonals, and all kinds of constraints."""
    draw = np.random.default_rng(n)

    def band(width: int) -> Any:
        return sp.diags_array([draw.standard_normal(n) for _ in range(width)], offsets=list(range(width)), shape=(n, n)).tocsr()

    root, G, A = band(3), band(3), band(5)[::4]
    inside = draw.standard_normal(n)
    P = root @ root.T + 0.1 * sp.eye_array(n)
    return _qp(P, draw.standard_normal(n), G, G @ inside + draw.random(n), A, A @ inside, inside - 1, inside + 1)


def _qp(P: Any, q: Any, G: Any, h: Any, A: Any, b: Any, lb: Any = None, ub: Any = None) -> SparseQP:
    n, none = len(q), np.zeros(0)
    matrices = [sp.csr_array((0, n)) if matrix is None else sp.csr_array(matrix) for matrix in (P, G, A)]
    for matrix in matrices:
        matrix.sum_duplicates()
    P, G, A = matrices
    lb, ub = (np.full(n, infinity) if side is None else side for side, infinity in ((lb, -np.inf), (ub, np.inf)))
    return SparseQP(P, q, G, none if h is None else h, A, none if b is None else b, lb, ub)


def ours(qp: SparseQP, cotangent: Any) -> Answer:
    """solve_qp with the stored entries as parameters."""
    matrices = {name: _entries(getattr(qp, name)) for name in "PGA"}
    vectors = {name: torch.from_numpy(getattr(qp, name)) for name in ("q", "h", "b", "lb", "ub")}
    for part in (*(matrix.values for matrix in matrices.values()), *vectors.values()):
        part.requires_grad_()
    boxed = {"lb": vectors["lb"], "ub": vectors["ub"]} if np.isfinite([qp.lb, qp.ub]).any() else {}
    found = solve_qp(matrices["P"], vectors["q"], matrices["G"], vectors["h"], matrices["A"], vectors["b"], **boxed)
    leaves = [matrices["P"].values, vectors["q"], matrices["G"].values, vectors["h"], matrices["A"].values, vectors["b"], *boxed.values()]
    slopes = torch.autograd.grad(found.x, leaves, torch.from_numpy(cotangent))
    z_box = np.zeros(len(qp.q)) if found.z_box is None else found.z_box.detach().numpy()
    sides = np.maximum(-z_box, 0)[np.isfinite(qp.lb)], np.maximum(z_box, 0)[np.isfinite(qp.ub)]
    multipliers = np.concatenate([found.y.detach().numpy(), found.z.detach().numpy(), *sides])
    return Answer(found.x.detach().numpy(), multipliers, tuple(slope.numpy() for slope in slopes[:6]))


def _entries(matrix: Any) -> SparseMatrix:
    indices = torch.from_numpy(np.stack(matrix.tocoo().coords).astype(np.int64))
    return SparseMatrix(indices, torch.from_numpy(matrix.data.copy()), matrix.shape)


def moreau(qp: SparseQP, cotangent: Any) -> Answer:
    """Its torch solver, built anew: the structure is analyzed at the first solve."""
    from moreau import Cones, Settings
    from moreau.torch import Solver

    rows, limits = qp.rows
    p = len(qp.b)
    structure = [torch.from_numpy(part.astype(np.int64)) for part in (qp.P.indptr, qp.P.indices, rows.indptr, rows.indices)]
    cones = Cones(num_zero_cones=p, num_nonneg_cones=len(limits) - p)
    solver = Solver(len(qp.q), len(limits), *structure, cones=cones, settings=Settings(device="cpu", enable_grad=True))
    leaves = [torch.from_numpy(part.copy()).requires_grad_() for part in (qp.P.data, rows.data, qp.q, limits)]
    found = solver.solve(*leaves)
    slopes = [slope.numpy() for slope in torch.autograd.grad(found.x, leaves, torch.from_numpy(cotangent))]
    return _from_rows(qp, found.x.detach().numpy(), found.z.detach().numpy(), slopes)


def osqp(qp: SparseQP, cotangent: Any) -> Answer:
    """Its torch layer at a tolerance of 1e-8; multipliers are not returned."""
    from osqp.nn.torch import OSQP

    rows, limits = qp.rows
    i, j = rows.tocoo().coords
    order = np.lexsort((i, j))  # whatever the order of its input, the gradients come back column by column
    layer = OSQP(qp.P.tocoo().coords, qp.P.shape, (i[order], j[order]), rows.shape, eps_rel=1e-8, eps_abs=1e-8)
    least = np.concatenate([qp.b, np.full(len(limits) - len(qp.b), -1e20)])
    leaves = [torch.from_numpy(part.copy()).requires_grad_() for part in (qp.P.data, rows.data[order], qp.q, limits, least)]
    by_P, by_rows, q, upper, lower = leaves
    x = layer(by_P, q, by_rows, lower, upper)
    slopes = [slope.numpy().ravel() for slope in torch.autograd.grad(x.squeeze(0), leaves, torch.from_numpy(cotangent))]
    slopes[1] = slopes[1][np.argsort(order)]
    return _from_rows(qp, x.detach().numpy().ravel(), None, [*slopes[:3], slopes[3] + slopes[4]])


def _from_rows(qp: SparseQP, x: Any, multipliers: Any, slopes: list[Any]) -> Answer:
    by_P, by_rows, by_q, by_limits = slopes
    p, m, first, second = len(qp.b), len(qp.h), qp.A.nnz, qp.A.nnz + qp.G.nnz
    slopes = [by_P, by_q, by_rows[first:second], by_limits[p : p + m], by_rows[:first], by_limits[:p]]
    return Answer(x, multipliers, tuple(slopes))


PEERS: dict[str, tuple[str, Callable[[SparseQP, Any], Answer]]] = {
    "moreau": ("moreau", moreau),
    "osqp": ("osqp", osqp),
}


def _attempt(run: Callable[[SparseQP, Any], Answer], qp: SparseQP, cotangent: Any) -> Answer | str:
    try:
        return run(qp, cotangent)
    except Exception as error:  # whatever a contestant raises is its result
        return type(error).__name__


def kkt_residual(qp: SparseQP, answer: Answer) -> float | None:
    """The largest entry of the optimality conditions."""
    if answer.multipliers is None:
        return None
    rows, limits = qp.rows
    slack, p = limits - rows @ answer.x, len(qp.b)
    gradient = qp.P @ answer.x + qp.q + rows.T @ answer.multipliers
    parts = gradient, slack[:p], np.minimum(slack[p:], answer.multipliers[p:])
    return float(max(np.abs(part).max(initial=0.0) for part in parts))


def reference(qp: SparseQP, cotangent: Any, guess: Answer) -> tuple[Any, ...] | None:
    """The exact gradients, or None if the active set of the guess cannot be proved optimal, or the optimum is degenerate."""
    if guess.multipliers is None:
        return None
    rows, limits = qp.rows
    n, p = len(qp.q), len(qp.b)
    active = guess.multipliers > limits - rows @ guess.x
    active[:p] = True
    E = rows[active]
    try:
        factor = splu(sp.block_array([[qp.P, E.T], [E, None]], format="csc"))
    except RuntimeError:
        return None
    solution = factor.solve(np.concatenate([-qp.q, limits[active]]))
    x, multipliers = solution[:n], np.zeros(len(limits))
    multipliers[active] = solution[n:]
    if not (np.maximum(multipliers, np.where(active, 0.0, limits - rows @ x))[p:] > 1e-9).all():
        return None
    adjoint = factor.solve(np.concatenate([-cotangent, np.zeros(len(E.indptr) - 1)]))
    u, v = adjoint[:n], np.zeros(len(limits))
    v[active] = adjoint[n:]
    (i, j), (k, l) = qp.P.tocoo().coords, rows.tocoo().coords
    slopes = [(u[i] * x[j] + x[i] * u[j]) / 2, v[k] * x[l] + multipliers[k] * u[l], u, -v]
    return _from_rows(qp, x, multipliers, slopes).gradients


def gradient_error(answer: Answer, exact: tuple[Any, ...]) -> float:
    """The worst relative error of any parameter; where a gradient is tiny, relative to a thousandth of the largest one."""
    sizes = [float(np.linalg.norm(old)) for old in exact]
    errors = [float(np.linalg.norm(new - old)) for new, old in zip(answer.gradients, exact, strict=True)]
    return max(error / max(size, 1e-3 * max(sizes)) for error, size in zip(errors, sizes, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
