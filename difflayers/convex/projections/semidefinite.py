r"""Projection on the cone of positive semidefinite matrices, differentiable where eigenvalues repeat.

For a symmetric :math:`X = Q \operatorname{diag}(λ) Q^T` the projection and its complement are

.. math:: Π(X) = Q \operatorname{diag}(λ^+) Q^T = X + N, \qquad N = Q \operatorname{diag}((-λ)^+) Q^T.

Eigenvectors have no derivative at a repeated eigenvalue, but N has one: it is a root of

.. math:: F(N; X) = \tfrac12 \bigl(N (N + X) + (N + X) N\bigr) = 0, \qquad
   \frac{∂F}{∂N} D = \tfrac12 \bigl(|X| D + D |X|\bigr),

which the core differentiates to any order. It is posed for :math:`Q^T X Q` with Q held constant, which changes nothing,
since the cone does not change under rotations. There N and :math:`|X|` are diagonal: the linear systems are divisions by
:math:`\tfrac12 (|λ_i| + |λ_j|)`, regular unless two eigenvalues are zero, and no product cancels. The first derivative is the
familiar :math:`Q (Ω ∘ Q^T H Q) Q^T` with :math:`Ω_{ij} = (λ_i^+ - λ_j^+) / (λ_i - λ_j)`, to rounding for any eigenvalues.

References: Malick and Sendov, Clarke generalized Jacobian of the projection onto the cone of positive semidefinite matrices,
Set-Valued Analysis 14 (2006); Sun and Sun, Semismooth matrix-valued functions, Mathematics of Operations Research 27 (2002).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ShapeError
from ...implicit.broadcasting import BroadcastingProblem
from ...implicit.closure import visible_to_modes
from ...implicit.eager import eager
from ...implicit.function import ImplicitFunction, solve_implicitly
from ...solution import Solution
from .arguments import check_rows

__all__ = ["projection_psd_cone"]

# Its inverse, squared, does not overflow.
_ZERO = 1e-150


@eager
def projection_psd_cone(x: Tensor, hyperparams: None = None) -> Tensor:
    """The nearest symmetric positive semidefinite matrix, in the Frobenius norm.

    One eigendecomposition, in float64; derivatives of any order reuse it. They are exact also where eigenvalues repeat, as long as none
    is zero. Zero eigenvalues count as positive: on the boundary of the cone the derivative is that of the inside.

    Args:
        x: ``(*batch, n, n)``, read as its symmetric part.
        hyperparams: not used; the place where other projections have their parameters.

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
    n, batch_ndim = X.shape[-1], X.dim() - 2
    (plain,) = visible_to_modes([X.detach()])
    Q, values = ImplicitFunction.apply(_Eigenbasis(batch_ndim), X.new_zeros(0), plain)[1:]
    start, theta = visible_to_modes([torch.zeros_like(X).flatten(-2), Q.mT @ X @ Q])
    rotated = solve_implicitly(_NegativePart(n, batch_ndim), start, [theta]).x.unflatten(-1, (n, n))
    # Zero, and not its rounding, where no eigenvalue is positive.
    negative = (values < 0).all(-1)[..., None, None] if n else torch.zeros_like(X, dtype=torch.bool)
    return torch.where(negative, 0, X + Q @ rotated @ Q.mT).to(x.dtype)


class _Eigenbasis(BroadcastingProblem):
    """Eigenvectors and eigenvalues, as constants; NaN where a matrix is not finite."""

    core_ndims = (2,)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        X = theta[0]
        # LAPACK stops at a NaN, and with it the whole batch.
        finite = torch.isfinite(X).all(-1).all(-1)[..., None]
        values, Q = torch.linalg.eigh(torch.where(finite.unsqueeze(-1), X, 0))
        return x0.clone(), torch.where(finite.unsqueeze(-1), Q, torch.nan), torch.where(finite, values, torch.nan)

    def deeper(self, size: int) -> _Eigenbasis:
        return _Eigenbasis(self.batch_ndim + 1)


class _NegativePart(BroadcastingProblem):
    """N ``(*batch, n²)`` of an X ``(*batch, n, n)`` that is diagonal but for rounding."""

    core_ndims = (2,)

    def __init__(self, n: int, batch_ndim: int) -> None:
        super().__init__(batch_ndim, residual=self._complementarity)
        self.n = n

    def _complementarity(self, x: Tensor, X: Tensor) -> Tensor:
        N = self._matrix(x)
        return ((N @ (N + X) + (N + X) @ N) / 2).flatten(-2)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Solution:
        negative = (-theta[0].diagonal(dim1=-2, dim2=-1)).clamp(min=0)
        x = torch.diag_embed(negative).flatten(-2).expand(x0.shape).clone()
        status = torch.zeros(x0.shape[:-1], dtype=torch.int64, device=x0.device)
        return Solution(x, status, x0.new_zeros(x0.shape[:-1]), status.clone())

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
        sizes = point[1].diagonal(dim1=-2, dim2=-1).abs()
        sums = (sizes.unsqueeze(-1) + sizes.unsqueeze(-2)).flatten(-2) / 2
        # Two eigenvalues that are zero have no derivative between them.
        zero = sums <= _ZERO
        solved = torch.where(zero, 0, rhs / torch.where(zero, 1, sums))
        status = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)
        return Solution(solved, status, rhs.new_zeros(rhs.shape[:-1]), status.clone())

    def deeper(self, size: int) -> _NegativePart:
        return _NegativePart(self.n, self.batch_ndim + 1)

    def _matrix(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.n, self.n))
