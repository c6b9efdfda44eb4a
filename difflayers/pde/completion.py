r"""The missing part of a Gram matrix whose rows are redundant.

.. math:: N = \sum_{λ_i \le ε} (1 - λ_i)\, q_i q_i^T \qquad\text{for } A = \sum_i λ_i\, q_i q_i^T \text{ with unit diagonal}.

A + N is positive definite, and on the range of A its inverse is the pseudoinverse: for a right-hand side that redundant equations
agree on, a Cholesky factor of A + N solves A x = r. N is held constant by derivatives: if :math:`K z = 0` for every z with
:math:`A z = 0`, and stays so, then :math:`K (A + N)^{-1} r = K A^+ r` in value and in derivatives of every order. Where A is definite N
is zero, and Cholesky's factorization is the test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..implicit.broadcasting import BroadcastingProblem
from ..implicit.closure import visible_to_modes
from ..implicit.function import ImplicitFunction

__all__ = ["completion"]


def completion(A: Tensor) -> tuple[Tensor, Tensor]:
    """What makes positive semidefinite matrices definite; no derivative flows through it.

    Args:
        A: ``(*batch, m, m)`` in float64, finite and symmetric, each diagonal entry one or (a row of zeros) zero.

    Returns:
        N ``(*batch, m, m)``, and ``(*batch,)`` bool: A has a negative eigenvalue.
    """
    _, missing, indefinite = ImplicitFunction.apply(_Completion(A.dim() - 2), A.new_zeros(0), *visible_to_modes([A.detach()]))
    return missing, indefinite


class _Completion(BroadcastingProblem):
    core_ndims = (2,)

    def find(self, x0: Tensor, theta: Sequence[Any]) -> Any:
        (A,) = theta
        missing = torch.zeros_like(A)
        indefinite = torch.zeros(A.shape[:-2], dtype=torch.bool, device=A.device)
        # A Gram matrix has lost the square of what its rows differ by: pivots of this size are rounding.
        noise = 100 * max(A.shape[-1], 1) * torch.finfo(A.dtype).eps
        factor, info = torch.linalg.cholesky_ex(A)
        lost = (info != 0) | ~(factor.diagonal(dim1=-2, dim2=-1).square() > noise).all(-1)
        if bool(lost.any()):
            values, vectors = torch.linalg.eigh(A[lost])
            missing[lost] = (vectors * torch.where(values <= noise, 1 - values, 0).unsqueeze(-2)) @ vectors.mT
            indefinite[lost] = (values < -noise).any(-1)
        return (x0.clone(), missing, indefinite)

    def deeper(self, size: int) -> _Completion:
        return _Completion(self.batch_ndim + 1)
