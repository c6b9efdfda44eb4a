r"""The nuclear norm: the soft threshold of the singular values, differentiable where they repeat or are zero.

.. math:: \operatorname{prox}_{λ\|\cdot\|_*}(X) = U \operatorname{diag}\bigl((σ - λ)^+\bigr) V^T, \qquad X = U \operatorname{diag}(σ) V^T.

Singular vectors have no derivative at a repeated singular value, but this function of X has one. The eigenvalues of the symmetric embedding

.. math:: A = \begin{pmatrix} 0 & X \\ X^T & 0 \end{pmatrix}, \qquad A - λI = Q \operatorname{diag}(\pm σ_i - λ, \dots) Q^T,

are ±σ and zeros, with eigenvectors (u, ±v) / √2, so for λ ≥ 0 the operator is twice the upper right block of the projection of A − λI on
the positive semidefinite cone, which the core differentiates to any order, for any eigenvalues but at the kinks σ = λ. Where nothing is
differentiated, one singular value decomposition is cheaper.

References: Cai, Candès and Shen, A singular value thresholding algorithm for matrix completion, SIAM Journal on Optimization 20
(2010), arXiv:0810.3286; Candès, Sing-Long and Trzasko, Unbiased risk estimates for singular value thresholding, IEEE TSP 61
(2013), arXiv:1210.4139 (the first derivative).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...convex.projections import projection_psd_cone
from ...convex.projections.arguments import check_rows
from ...errors import ShapeError
from ...implicit.eager import eager
from ...implicit.function import in_a_transform
from ...solution import OnFailure
from .arguments import Number, negative, row_weight, weights_reported

__all__ = ["prox_nuclear"]


@eager
def prox_nuclear(X: Tensor, lam: Number, *, on_failure: OnFailure = "raise") -> Tensor:
    """The proximal operator of λ‖X‖_*, the sum of the singular values: each of them gets smaller by λ, but not below zero.

    Computed in float64. Derivatives of any order are exact, also where singular values repeat or are zero, as long as none equals λ; there
    the derivative is that of the outside. λ = 0 is the identity, and its derivative in λ is taken as zero.

    Args:
        X: ``(*batch, m, n)``.
        lam: λ ≥ 0, ``(*batch,)`` or a number.
        on_failure: ``"raise"``, ``"nan"`` or ``"warn"`` where λ is negative.

    Returns:
        ``(*batch, m, n)``. A matrix that is not finite gives NaN.

    Raises:
        NotConvergedError: λ is negative somewhere (``on_failure="raise"``).
        ShapeError: shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from difflayers.prox.operators import prox_nuclear
        >>> prox_nuclear(torch.tensor([[3.0, 0.0, 0.0], [0.0, -2.0, 0.0]]), 1.0)
        tensor([[ 2.,  0.,  0.],
                [ 0., -1.,  0.]])
    """
    check_rows(X, "X")
    if X.dim() < 2:
        raise ShapeError(f"X must have the shape (*batch, m, n), got {tuple(X.shape)}")
    weight = row_weight(lam, "lam", X, core_ndim=2).to(torch.float64)
    matrix = X.to(torch.float64)
    differentiated = in_a_transform(X, weight) or (torch.is_grad_enabled() and (X.requires_grad or weight.requires_grad))
    point = (_by_the_embedding if differentiated else _by_singular_values)(matrix, weight)
    point = torch.where(weight == 0, matrix, point).to(X.dtype)
    return weights_reported(point, negative(lam), "prox_nuclear", on_failure, core_ndim=2)


def _by_the_embedding(X: Tensor, weight: Tensor) -> Tensor:
    m, n = X.shape[-2:]
    X = X.expand(*torch.broadcast_shapes(X.shape[:-2], weight.shape[:-2]), m, n)
    shift = (-weight).expand(*X.shape[:-2], 1, 1)
    above = torch.cat([shift * torch.eye(m, dtype=X.dtype, device=X.device), X], -1)
    below = torch.cat([X.mT, shift * torch.eye(n, dtype=X.dtype, device=X.device)], -1)
    return 2 * projection_psd_cone(torch.cat([above, below], -2))[..., :m, m:]


def _by_singular_values(X: Tensor, weight: Tensor) -> Tensor:
    # LAPACK stops at a NaN, and with it the whole batch.
    finite = torch.isfinite(X).all(-1, keepdim=True).all(-2, keepdim=True) & torch.isfinite(weight)
    U, values, V = torch.linalg.svd(torch.where(finite, X, 0), full_matrices=False)
    point = (U * (values - weight.squeeze(-1)).clamp(min=0).unsqueeze(-2)) @ V
    return torch.where(finite, point, torch.nan)
