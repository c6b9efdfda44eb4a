r"""Projection on the cone of positive semidefinite matrices, differentiable where eigenvalues repeat.

For a symmetric :math:`X = Q \operatorname{diag}(λ) Q^T` the projection and its complement are

.. math:: Π(X) = Q \operatorname{diag}(λ^+) Q^T = X + N, \qquad N = Q \operatorname{diag}((-λ)^+) Q^T.

Eigenvectors have no derivative at a repeated eigenvalue, but N has one: it is a root of

.. math:: F(N; X) = \tfrac12 \bigl(N (N + X) + (N + X) N\bigr) = 0, \qquad
   \frac{∂F}{∂N} D = \tfrac12 \bigl(|X| D + D |X|\bigr),

which the core differentiates to any order. In the eigenbasis, where :math:`|X|` is diagonal, its linear systems are divisions by
:math:`\tfrac12 (|λ_i| + |λ_j|)`. They are regular unless two eigenvalues are zero. The first derivative is the familiar
:math:`Q (Ω ∘ Q^T H Q) Q^T` with :math:`Ω_{ij} = (λ_i^+ - λ_j^+) / (λ_i - λ_j)`.

References: Malick and Sendov, Clarke generalized Jacobian of the projection onto the cone of positive semidefinite matrices,
Set-Valued Analysis 14 (2006); Sun and Sun, Semismooth matrix-valued functions, Mathematics of Operations Research 27 (2002).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ShapeError
from ...implicit.closure import visible_to_modes
from ...implicit.eager import eager
from ...implicit.function import Problem, solve_implicitly
from ...implicit.methods import LinearMethod
from ...solution import Solution
from .arguments import check_rows

__all__ = ["projection_psd_cone"]


@eager
def projection_psd_cone(x: Tensor) -> Tensor:
    """The nearest symmetric positive semidefinite matrix, in the Frobenius norm.

    One eigendecomposition, in float64; derivatives of any order reuse it. They are exact also where eigenvalues repeat, as long as none
    is zero. Zero eigenvalues count as positive: on the boundary of the cone the derivative is that of the inside. It loses as many digits
    as the smallest eigenvalue is smaller than the largest.

    Args:
        x: ``(*batch, n, n)``, read as its symmetric part.

    Returns:
        ``(*batch, n, n)``. A matrix that is not finite gives NaN.

    Raises:
        ShapeError: x is not a floating tensor of square matrices.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_psd_cone
        >>> projection_psd_cone(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        tensor([[1., 0.],
                [0., 0.]])
    """
    check_rows(x, "x")
    if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
        raise ShapeError(f"x must have the shape (*batch, n, n), got {tuple(x.shape)}")
    X = x.to(torch.float64)
    X = (X + X.mT) / 2
    problem = _NegativePart(X.shape[-1], X.dim() - 2)
    start, theta = visible_to_modes([torch.zeros_like(X).flatten(-2), X])
    negative = solve_implicitly(problem, start, [theta]).x.unflatten(-1, X.shape[-2:])
    return (X + negative).to(x.dtype)


class _NegativePart(Problem):
    """N (*batch, n²) of X (*batch, n, n); batches broadcast by themselves."""

    def __init__(self, n: int, batch_ndim: int) -> None:
        super().__init__(self._complementarity, _find_nothing, LinearMethod(), batch_ndim=batch_ndim)
        self.n = n

    def _complementarity(self, x: Tensor, X: Tensor) -> Tensor:
        N = self._matrix(x)
        return ((N @ (N + X) + (N + X) @ N) / 2).flatten(-2)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Solution:
        values, Q = self._factor = self._decomposed(theta[0])
        N = (Q * (-values).clamp(min=0).unsqueeze(-2)) @ Q.mT
        if self.n:
            # Exactly its negative where X has no positive eigenvalue, so that the projection is zero and not its rounding.
            N = torch.where((values[..., -1] <= 0)[..., None, None], -theta[0], (N + N.mT) / 2)
        status = torch.zeros(x0.shape[:-1], dtype=torch.int64, device=x0.device)
        finite = torch.isfinite(theta[0]).all(-1).all(-1)[..., None]
        x = torch.where(finite, N.flatten(-2), torch.nan)
        return Solution(x.expand(x0.shape).clone(), status, x0.new_zeros(x0.shape[:-1]), status.clone())

    def operator(self, point: Sequence[Any], transpose: bool) -> Callable[[Tensor], Tensor]:
        x, X = point
        absolute = 2 * self._matrix(x) + X
        # Symmetric in exact arithmetic, but not as a function of N and X: the transpose differs in its derivatives.
        left, right = (absolute.mT, absolute.mT) if transpose else (absolute, absolute)

        def product(u: Tensor) -> Tensor:
            U = self._matrix(u)
            return ((left @ U + U @ right) / 2).flatten(-2)

        return product

    def solve_linear(self, point: Sequence[Any], rhs: Tensor, transpose: bool, columns: bool) -> Solution:
        if self._factor is None:
            self._factor = self._decomposed(point[1])
        values, Q = self._factor
        sizes = values.abs()
        sums = (sizes.unsqueeze(-1) + sizes.unsqueeze(-2)) / 2
        # Two eigenvalues that are zero but for rounding have no derivative between them.
        least = self.n * torch.finfo(values.dtype).eps * sizes.amax(-1)[..., None, None] if self.n else 0
        regular = sums > least
        inverse = torch.where(regular, 1 / torch.where(regular, sums, 1), 0)
        solved = (Q @ (inverse * (Q.mT @ self._matrix(rhs) @ Q)) @ Q.mT).flatten(-2)
        status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
        return Solution(solved, status, rhs.new_zeros(rhs.shape[:-1]), status.clone())

    def batched(self, in_dims: tuple[int | None, ...], size: int, randomness: str) -> Problem:
        if size not in self._batched:
            self._batched[size] = _NegativePart(self.n, self.batch_ndim + 1)
        return self._batched[size]

    def _matrix(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.n, self.n))

    @staticmethod
    def _decomposed(X: Tensor) -> tuple[Tensor, Tensor]:
        # LAPACK stops at a NaN, and with it the whole batch.
        finite = torch.isfinite(X).all(-1).all(-1)[..., None, None]
        values, vectors = torch.linalg.eigh(torch.where(finite, X, 0))
        return values, vectors


def _find_nothing(*_: Any) -> Any:
    raise RuntimeError("an eigendecomposition finds the projection, not a solver of roots")
