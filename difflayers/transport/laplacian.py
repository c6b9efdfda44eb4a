r"""The Schur complement of the marginal equations, a graph Laplacian, factorized so that it never breaks down.

For a plan P with row sums r and column sums c, eliminating the rows leaves

.. math:: S = \operatorname{diag}(c) - P^T \operatorname{diag}(1/r) P,

the Laplacian of a graph on the columns: its off-diagonal entries are sums of nonnegative numbers and its rows sum to zero, so that the
diagonal is computed as the sum of the others, without cancellation. Constants are its null vectors. One node is grounded (the one with
the largest diagonal), a relative shift of the diagonal keeps groups of columns apart that rounding has disconnected, and each solution
is refined with the residual of the Laplacian itself, which is reported.

References: Cuturi, Teboul and Vert, Differentiable ranking and sorting using optimal transport, NeurIPS 2019, arXiv:1905.11885; Eisenberger
et al., A unified framework for implicit Sinkhorn differentiation, CVPR 2022, arXiv:2205.06688.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Laplacian"]

# A relative shift of the diagonal; if a pivot is lost nevertheless, one that is a hundred times as large, and so on.
_SHIFTS = (1e-14, 1e-12, 1e-10, 1e-8, 1e-6)


class Laplacian:
    """S = diag(QᵀQ 1) − QᵀQ with a Cholesky factor, for Q = diag(r)^(−1/2) P of shape ``(N, n, m)``.

    Args:
        Q: entries are nonnegative; columns of zeros are left alone.
    """

    def __init__(self, Q: Tensor) -> None:
        self.weights = Q.mT @ Q
        self.weights.diagonal(dim1=-2, dim2=-1).zero_()
        self.degree = self.weights.sum(-1)
        ground = self.degree.argmax(-1, keepdim=True)
        grounded = self.degree.scatter_add(-1, ground, self.degree.gather(-1, ground))
        # A node without neighbours has no equation; its potential stays zero.
        grounded = torch.where(grounded > 0, grounded, 1)
        self.factor, info = self._factorize(grounded, _SHIFTS[0])
        for shift in _SHIFTS[1:]:
            lost = (info != 0).nonzero().squeeze(-1)
            if not lost.numel():
                break
            self.factor[lost], info[lost] = self._factorize(grounded[lost], shift, self.weights[lost])

    def _factorize(self, grounded: Tensor, shift: float, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        matrix = -(self.weights if weights is None else weights)
        matrix.diagonal(dim1=-2, dim2=-1).copy_(grounded * (1 + shift))
        return torch.linalg.cholesky_ex(matrix)

    def solve(self, rhs: Tensor) -> Tensor:
        """S⁻ rhs for columns ``(N, m, k)``, each of which sums to zero: solved once, without refinement."""
        # Two triangular solves cost less than cholesky_solve.
        half = torch.linalg.solve_triangular(self.factor, rhs, upper=False)
        return torch.linalg.solve_triangular(self.factor.mT, half, upper=True)

    def refined(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """S⁻ rhs for columns ``(N, m, k)`` that sum to zero, and the relative residual ``(N, k)``."""
        solution = self.solve(rhs)
        residual = rhs - self.times(solution)
        better = solution + self.solve(residual)
        after = rhs - self.times(better)
        size, was = after.abs().sum(-2, keepdim=True), residual.abs().sum(-2, keepdim=True)
        solution = torch.where(size <= was, better, solution)
        scale = rhs.abs().sum(-2)
        return solution, torch.minimum(size, was).squeeze(-2) / torch.where(scale > 0, scale, 1)

    def times(self, u: Tensor) -> Tensor:
        """S u for columns ``(N, m, k)``."""
        return self.degree.unsqueeze(-1) * u - self.weights @ u
