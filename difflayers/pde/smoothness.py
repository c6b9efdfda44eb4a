r"""Smoothness as noisy equations: second differences of the values are small.

.. math:: u_{i-1} - 2 u_i + u_{i+1} = 0 + \text{noise of variance } V_{i-1} + 4 V_i + V_{i+1}
          - 4 α \sqrt{V_{i-1} V_i} + 2 α^2 \sqrt{V_{i-1} V_{i+1}} - 4 α \sqrt{V_i V_{i+1}},

V the prior variances: it is the variance that a second difference would have if neighbours were correlated with coefficient α and
second neighbours with α². A larger α trusts smoothness more; values near one flatten what is not straight.

Reference: Hansen, Maddix, Alizadeh, Gupta and Mahoney, Learning physical models that can respect conservation laws, ICML 2023,
arXiv:2302.11002 (diffusion as an additional, inexact constraint).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["second_difference_rows", "second_difference_variance"]


def second_difference_rows(n: int, like: Tensor) -> Tensor:
    """The rows (1, −2, 1) of second differences, ``(n − 2, n)``.

    Args:
        n: number of points.
        like: a tensor of the dtype and device wanted.
    """
    identity = torch.eye(n, dtype=like.dtype, device=like.device)
    return identity[:-2] - 2 * identity[1:-1] + identity[2:]


def second_difference_variance(variance: Tensor, correlation: float) -> Tensor:
    """The variance of each second difference, ``(*batch, n − 2)``, positive.

    Args:
        variance: ``(*batch, n)``, of the values.
        correlation: α in [0, 1), between neighbours.
    """
    deviation = torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)  # the square root has no slope at zero
    left, middle, right = deviation[..., :-2], deviation[..., 1:-1], deviation[..., 2:]
    ends = left.square() + 4 * middle.square() + right.square()
    small = ends - 4 * correlation * middle * (left + right) + 2 * correlation**2 * left * right
    # Three values that are certain are not asked to be smooth: with any noise the row has no effect on them.
    return torch.where(ends > 0, small, 1)
