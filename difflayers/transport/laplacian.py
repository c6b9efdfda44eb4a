r"""The Schur complement of the marginal equations, a graph Laplacian, factorized so that it never breaks down.

For a plan P with row sums r and column sums c, eliminating the rows leaves

.. math:: S = \operatorname{diag}(c) - P^T \operatorname{diag}(1/r) P,

the Laplacian of a graph on the columns: its off-diagonal entries are sums of nonnegative numbers and its rows sum to zero, so that the
diagonal is computed as the sum of the others, without cancellation. Constants are its null vectors, and one node is grounded. At small ε
the plan falls apart into groups of rows and columns that exchange less mass than rounding. The Laplacian then has more null vectors, up
to rounding; a tiny shift of the diagonal keeps the factorization alive, and each solution is refined with the residual of the Laplacian
itself, which is reported. Where marginals may be missed, what that adds to the diagonal makes the matrix nonsingular, and no node is
grounded.

References: Cuturi, Teboul and Vert, Differentiable ranking and sorting using optimal transport, NeurIPS 2019, arXiv:1905.11885; Eisenberger
et al., A unified framework for implicit Sinkhorn differentiation, CVPR 2022, arXiv:2205.06688.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Laplacian"]

# A relative shift of the diagonal; if a pivot is lost nevertheless, one that is a hundred times as large, and so on.
_SHIFTS = (1e-14, 1e-12, 1e-10, 1e-8, 1e-6)

_REFINEMENTS = 2


class Laplacian:
    """S = diag(QᵀQ 1 + excess) − QᵀQ, for Q = diag(r)^(−1/2) P of shape ``(N, n, m)``, with the Cholesky factor of S + diag(shift).

    Args:
        Q: entries are nonnegative.
        shift: ``(N, m)``, nonnegative, positive where a column may be zero.
        excess: ``(N, m)``, nonnegative, part of S; None: zero, so that one node is grounded.
    """

    def __init__(self, Q: Tensor, shift: Tensor, excess: Tensor | None = None) -> None:
        self.weights = Q.mT @ Q
        self.weights.diagonal(dim1=-2, dim2=-1).zero_()
        self.degree = self.weights.sum(-1)
        if excess is None:
            ground = self.degree.argmax(-1, keepdim=True)
            diagonal = self.degree.scatter_add(-1, ground, self.degree.gather(-1, ground)) + shift
        else:
            self.degree = self.degree + excess
            diagonal = self.degree + shift
        self.factor, info = self._factorize(self.weights, diagonal, _SHIFTS[0])
        for relative in _SHIFTS[1:]:
            lost = (info != 0).nonzero().squeeze(-1)
            if not lost.numel():
                break
            self.factor[lost], info[lost] = self._factorize(self.weights[lost], diagonal[lost], relative)

    def _factorize(self, weights: Tensor, diagonal: Tensor, relative: float) -> tuple[Tensor, Tensor]:
        matrix = -weights
        matrix.diagonal(dim1=-2, dim2=-1).copy_(diagonal * (1 + relative))
        return torch.linalg.cholesky_ex(matrix)

    def solve(self, rhs: Tensor) -> Tensor:
        """(S + diag(shift))⁻¹ rhs for columns ``(N, m, k)``, each of which sums to zero if there is no excess."""
        # Two triangular solves cost less than cholesky_solve.
        half = torch.linalg.solve_triangular(self.factor, rhs, upper=False)
        return torch.linalg.solve_triangular(self.factor.mT, half, upper=True)

    def refined(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """S⁻ rhs for such columns, and the 1-norm of the residual ``(N, k)``."""
        solution = self.solve(rhs)
        residual = rhs - self._times(solution)
        size = residual.abs().sum(-2, keepdim=True)
        for _ in range(_REFINEMENTS):
            better = solution + self.solve(residual)
            after = rhs - self._times(better)
            after_size = after.abs().sum(-2, keepdim=True)
            gained = after_size < size
            solution, residual = torch.where(gained, better, solution), torch.where(gained, after, residual)
            size = torch.minimum(after_size, size)
        return solution, size.squeeze(-2)

    def _times(self, u: Tensor) -> Tensor:
        """S u for columns ``(N, m, k)``."""
        return self.degree.unsqueeze(-1) * u - self.weights @ u
