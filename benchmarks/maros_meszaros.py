"""The Maros–Mészáros problems that are given by formulas, on the dense and the sparse engine, against the published optimal values.

No package ships the data files of the set (138 problems; I. Maros, C. Mészáros, Optim. Methods Softw. 11 (1999)). The members here are
rebuilt from their definitions, and reach the published values: Hock and Schittkowski's small problems, Gould's CVXQP family
(ill-conditioned, degenerate, rows that nearly depend on each other), and POWELL20, whose feasible set has no interior and whose limits grow
to n.

Run as ``python -m benchmarks.maros_meszaros``; ``--all`` adds those with 10 000 unknowns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from benchmarks.timing import Table, describe_machine, one_thread
from difflayers import Status
from difflayers.convex import SparseMatrix, solve_qp

__all__ = ["PROBLEMS", "Problem", "main", "solve"]


class Problem(NamedTuple):
    """min ½xᵀPx + qᵀx + constant  s.t.  Gx ≤ h, Ax = b, lb ≤ x ≤ ub."""

    P: Any
    q: Any
    constant: float = 0.0
    G: Any = None
    h: Any = None
    A: Any = None
    b: Any = None
    lb: Any = None
    ub: Any = None


def main(*, everything: bool = False) -> None:
    """Print the table."""
    one_thread()
    describe_machine(["clarabel", "scipy"])
    columns = [("problem", 10), ("n", -6), ("engine", 7), ("status", 8), ("objective", -14), ("error", -8), ("KKT", -8)]
    table = Table("Relative error of the objective, and the largest residual", columns)
    for name, (make, optimum) in PROBLEMS.items():
        problem = make()
        n = len(problem.q)
        if n > 1000 and not everything:
            continue
        for engine in ("dense", "sparse") if n <= 300 else ("sparse",):
            value, found = solve(problem, engine == "sparse")
            error = abs(value - optimum) / (1 + abs(optimum))
            residual = float(torch.maximum(found.primal_residual, found.dual_residual))
            table.row(name, n, engine, Status(int(found.status)).name, f"{value:.8g}", error, residual)


def solve(problem: Problem, sparse: bool) -> tuple[float, Any]:
    """The objective at the solution of one engine, and the solution."""
    part = problem._asdict()
    constant = part.pop("constant")
    for name in "PGA":
        if part[name] is not None:
            part[name] = _entries(part[name]) if sparse else torch.from_numpy(sp.csr_array(part[name]).toarray())
    part = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in part.items()}
    found = solve_qp(**part, on_failure="warn")
    x = found.x.numpy()
    return float(x @ (problem.P @ x) / 2 + problem.q @ x + constant), found


def _entries(matrix: Any) -> SparseMatrix:
    matrix = sp.coo_array(matrix)
    return SparseMatrix(torch.from_numpy(np.stack(matrix.coords).astype(np.int64)), torch.from_numpy(matrix.data), matrix.shape)


def _squares(rows: list[list[float]], targets: list[float]) -> tuple[Any, Any, float]:
    """P, q and the constant of Σ (rowᵀx − target)²."""
    R, t = np.array(rows, float), np.array(targets, float)
    return 2 * R.T @ R, -2 * R.T @ t, float(t @ t)


def _vector(*values: float) -> Any:
    return np.array(values, float)


def hs21() -> Problem:
    """0.01 x₁² + x₂² − 100."""
    G, lb, ub = np.array([[-10.0, 1.0]]), _vector(2, -50), _vector(50, 50)
    return Problem(np.diag([0.02, 2.0]), np.zeros(2), -100.0, G, _vector(-10), lb=lb, ub=ub)


def hs35(fixed: bool = False) -> Problem:
    """A quadratic on a simplex; HS35MOD fixes x₂."""
    P, q = np.array([[4.0, 2, 2], [2, 4, 0], [2, 0, 2]]), _vector(-8, -6, -4)
    lb, ub = _vector(0, 0.5 * fixed, 0), _vector(np.inf, 0.5 if fixed else np.inf, np.inf)
    return Problem(P, q, 9.0, np.array([[1.0, 1, 2]]), _vector(3), lb=lb, ub=ub)


def hs51(first: list[float], b: float, bound: float = np.inf) -> Problem:
    """HS51, HS52 and HS53: least squares with three equalities."""
    rows = [first, [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    A = np.array([[1.0, 3, 0, 0, 0], [0, 0, 1, 1, -2], [0, 1, 0, 0, -1]])
    return Problem(*_squares(rows, [0, 2, 1, 1]), A=A, b=_vector(b, 0, 0), lb=np.full(5, -bound), ub=np.full(5, bound))


def hs76() -> Problem:
    """Four unknowns, three rows, one of them active."""
    P = np.array([[2.0, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 2, 1], [0, 0, 1, 1]])
    G = np.array([[1.0, 2, 1, 1], [3, 1, 2, -1], [0, -1, -4, 0]])
    return Problem(P, _vector(-1, -3, 1, -1), 0.0, G, _vector(5, 4, -1.5), lb=np.zeros(4))


def hs118() -> Problem:
    """Production over five periods with limited changes; nearly linear."""
    change = np.eye(15)[3:] - np.eye(15)[:-3]
    limits = np.tile([6.0, 7.0, 6.0], 4)
    demand = np.kron(np.eye(5), np.ones((1, 3)))
    lb, ub = np.zeros(15), np.tile([90.0, 120.0, 60.0], 5)
    lb[:3], ub[:3] = (8, 43, 3), (21, 57, 16)
    h = np.concatenate([limits, np.full(12, 7.0), -_vector(60, 50, 70, 85, 100)])
    G = np.concatenate([change, -change, -demand])
    return Problem(np.diag(np.tile([2e-4, 2e-4, 3e-4], 5)), np.tile([2.3, 1.7, 2.2], 5), 0.0, G, h, lb=lb, ub=ub)


def tame() -> Problem:
    """(x − y)² with a singular P."""
    return Problem(*_squares([[1, -1]], [0]), A=np.ones((1, 2)), b=_vector(1), lb=np.zeros(2))


def genhs28() -> Problem:
    """Σ (xᵢ + xᵢ₊₁)² with eight equalities."""
    rows, A = np.eye(10)[:-1] + np.eye(10)[1:], np.eye(10)[:-2] + 2 * np.eye(10)[1:-1] + 3 * np.eye(10)[2:]
    return Problem(*_squares(rows.tolist(), [0.0] * 9), A=A, b=np.ones(8))


def cvxqp(n: int, share: float) -> Problem:
    """Gould's family: weights from 1 to n, rows that couple far entries, box."""
    i, m = np.arange(1, n + 1), int(share * n)

    def pick(columns: Any, size: int, weight: float = 1.0) -> Any:
        return sp.csr_array((np.full(size, weight), (np.arange(size), columns)), (size, n))

    rows, k = pick(i - 1, n) + pick((2 * i - 1) % n, n) + pick((3 * i - 1) % n, n), i[:m]
    A = pick(k - 1, m) + pick((4 * k - 1) % n, m, 2.0) + pick((5 * k - 1) % n, m, 3.0)
    return Problem(rows.T @ sp.diags_array(i + 0.0) @ rows, np.zeros(n), A=A, b=np.full(m, 6.0), lb=np.full(n, 0.1), ub=np.full(n, 10.0))


def powell20(n: int = 10000) -> Problem:
    """½‖x‖² with a ring of differences whose right-hand sides grow to n."""
    k = np.arange(1, n)
    ring = sp.diags_array([-np.ones(n), np.ones(n - 1)], offsets=[0, 1], shape=(n, n)).tolil()
    ring[n - 1, 0], ring[n - 1, n - 1] = 1.0, -1.0
    least = np.concatenate([-0.5 + (-1.0) ** k * k, [n - 0.5]])
    return Problem(sp.eye_array(n), np.zeros(n), 0.0, -ring.tocsr(), -least)


# By name: the problem, and the value that the set's readme gives to eight digits.
PROBLEMS: dict[str, tuple[Callable[[], Problem], float]] = {
    "HS21": (hs21, -99.96),
    "HS35": (hs35, 1.1111111e-1),
    "HS35MOD": (lambda: hs35(fixed=True), 0.25),
    "HS51": (lambda: hs51([1, -1, 0, 0, 0], 4.0), 0.0),
    "HS52": (lambda: hs51([4, -1, 0, 0, 0], 0.0), 5.3266476),
    "HS53": (lambda: hs51([1, -1, 0, 0, 0], 0.0, 10.0), 4.0930233),
    "HS76": (hs76, -4.6818182),
    "HS118": (hs118, 6.6482045e2),
    "TAME": (tame, 0.0),
    "GENHS28": (genhs28, 9.2717369e-1),
    "CVXQP1_S": (lambda: cvxqp(100, 0.5), 1.1590718e4),
    "CVXQP2_S": (lambda: cvxqp(100, 0.25), 8.1209405e3),
    "CVXQP3_S": (lambda: cvxqp(100, 0.75), 1.1943432e4),
    "CVXQP1_M": (lambda: cvxqp(1000, 0.5), 1.0875116e6),
    "CVXQP2_M": (lambda: cvxqp(1000, 0.25), 8.2015543e5),
    "CVXQP3_M": (lambda: cvxqp(1000, 0.75), 1.3628287e6),
    "POWELL20": (powell20, 5.2089583e10),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also the problem with 10 000 unknowns")
    main(everything=parser.parse_args().all)
