"""Plans and their derivatives in eighty digits, where couplings far below the rounding of float64 count."""

from __future__ import annotations

from typing import Any

import mpmath as mp
import torch
from torch import Tensor

from difflayers.transport import TransportSolution

__all__ = ["exact_plan_and_slopes"]


def exact_plan_and_slopes(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, start: TransportSolution, G: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The plan, and the gradient of ⟨G, plan⟩ in cost, a and b, by Newton's method from ``start`` on all equations but the last."""
    n, m = cost.shape
    with mp.workdps(80):
        C, weights = (mp.matrix(part.tolist()) for part in (cost, G))
        wanted = [mp.mpf(part) for part in torch.cat([a, b]).tolist()]
        ratio = sum(wanted[:n]) / sum(wanted[n:])
        wanted[n:] = [ratio * part for part in wanted[n:]]
        x = [mp.mpf(part) for part in torch.cat([start.f, start.g]).tolist()]
        for _ in range(30):
            P = mp.matrix(n, m)
            for i in range(n):
                for j in range(m):
                    P[i, j] = mp.exp((x[i] + x[n + j] - C[i, j]) / mp.mpf(epsilon))
            missing = [want - have for want, have in zip(wanted, _sums(P), strict=True)]
            if sum(abs(part) for part in missing) < mp.mpf(10) ** -60:
                break
            x = [part + mp.mpf(epsilon) * step for part, step in zip(x, _solve(P, missing), strict=True)]
        else:
            raise AssertionError("the reference has not converged")
        M = mp.matrix(n, m)
        for i in range(n):
            for j in range(m):
                M[i, j] = P[i, j] * weights[i, j]
        u = _solve(P, _sums(M))
        slope = [[float((P[i, j] * (u[i] + u[n + j]) - M[i, j]) / mp.mpf(epsilon)) for j in range(m)] for i in range(n)]
        plan = [[float(P[i, j]) for j in range(m)] for i in range(n)]
        rows, columns = torch.tensor([float(part) for part in u], dtype=torch.float64).split([n, m])
    return torch.tensor(plan, dtype=torch.float64), (torch.tensor(slope, dtype=torch.float64), rows, columns)


def _sums(P: Any) -> list[Any]:
    rows = [sum(P[i, j] for j in range(P.cols)) for i in range(P.rows)]
    return rows + [sum(P[i, j] for i in range(P.rows)) for j in range(P.cols)]


def _solve(P: Any, rhs: list[Any]) -> list[Any]:
    n, size = P.rows, P.rows + P.cols - 1
    matrix = mp.matrix(size, size)
    for k, total in enumerate(_sums(P)[:-1]):
        matrix[k, k] = total
    for i in range(n):
        for j in range(P.cols - 1):
            matrix[i, n + j] = matrix[n + j, i] = P[i, j]
    return [*mp.lu_solve(matrix, mp.matrix(rhs[:-1])), mp.mpf(0)]
