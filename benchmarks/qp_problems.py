"""The random problems that the QP benchmarks time."""

from __future__ import annotations

import functools

import torch

from benchmarks.qp_layers import QP, times

__all__ = ["box_qp", "random_qp"]


def random_qp(n: int, m: int, p: int, batch: int, *, shared: bool = False) -> QP:
    """Feasible and strictly convex; which rows are active is left to chance."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1000 * n + batch))
    matrices = () if shared else (batch,)
    root = draw(*matrices, n, n)
    P = root @ root.mT / n + 0.1 * torch.eye(n)
    G, A, inside = draw(*matrices, m, n), draw(*matrices, p, n), draw(batch, n)
    return QP(P, draw(batch, n), G, times(G, inside) + draw(batch, m).abs(), A, times(A, inside))


def box_qp(batch: int, n: int = 63) -> QP:
    """The dual of total variation denoising of lines of n + 1 samples: P = DDᵀ, q = −Dy, |x_i| ≤ w_i."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(batch))
    D = torch.diff(torch.eye(n + 1), dim=0)
    step = (torch.arange(n + 1) > n // 2) + 0.0
    weight = 0.1 + 0.3 * draw(batch, n).abs()
    return QP(D @ D.mT, -times(D, step + 0.2 * draw(batch, n + 1)), lb=-weight, ub=weight)
