"""A small sparse QP for the registry: the values of its patterns are its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.convex import SparseMatrix, solve_qp

__all__ = ["dense_qp", "infeasible", "sparse_qp", "sparse_qp_inputs", "unbounded"]

Inputs = tuple[Tensor, ...]

# P has an entry without its mirror image, and one of A's places is stored twice.
PATTERNS = (
    (torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 1, 0]]), (3, 3)),
    (torch.tensor([[0, 0, 1, 1], [0, 2, 1, 2]]), (2, 3)),
    (torch.tensor([[0, 0, 0], [0, 1, 0]]), (1, 3)),
)


def sparse_qp(P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor, lb: Tensor, ub: Tensor, **options: str) -> Tensor:
    """All the unknowns and multipliers of a QP with fixed patterns."""
    matrices = [SparseMatrix(indices, values, shape) for (indices, shape), values in zip(PATTERNS, (P, G, A), strict=True)]
    return torch.cat(solve_qp(matrices[0], q, matrices[1], h, matrices[2], b, lb, ub, **options)[:4], -1)


def dense_qp(*inputs: Tensor) -> Tensor:
    """The same with dense matrices."""
    dense = [_dense(part, i // 2) if i in (0, 2, 4) else part for i, part in enumerate(inputs)]
    return torch.cat(solve_qp(*dense)[:4], -1)


def _dense(values: Tensor, which: int) -> Tensor:
    (rows, columns), shape = PATTERNS[which]
    flat = torch.zeros(*values.shape[:-1], shape[0] * shape[1], dtype=values.dtype)
    return flat.index_add(-1, rows * shape[1] + columns, values).unflatten(-1, shape)


def sparse_qp_inputs(generator: torch.Generator) -> Inputs:
    """At the solution one row of G and one bound are active, with multipliers away from zero."""

    def near(*values: float) -> Tensor:
        exact = torch.tensor(values, dtype=torch.float64)
        return exact + 0.05 * torch.randn(len(values), generator=generator, dtype=torch.float64)

    limits = (torch.full((3,), -1.5, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64))
    return near(1, 1.2, 0.9, 0.1, 0.2), near(-4, 0.5, 4), near(1, 0.3, 1, 0.2), near(0.5, 4), near(0.1, 1, 0.1), near(0), *limits


def infeasible(P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor, lb: Tensor, ub: Tensor) -> Inputs:
    """A row of G beyond the bounds."""
    return P, q, G, torch.full_like(h, -20.0), A, b, lb, ub


def unbounded(P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor, lb: Tensor, ub: Tensor) -> Inputs:
    """The objective falls along (0, 0, −1), which no constraint sees but the bounds that are taken off."""
    P, G, A = (part * (indices[1] < 2) for part, (indices, _) in zip((P, G, A), PATTERNS, strict=True))
    return P, q, G, h, A, b, torch.full_like(lb, -torch.inf), torch.full_like(ub, torch.inf)
