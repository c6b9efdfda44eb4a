r"""Projection on the second-order cone, in closed form.

.. math:: K = \{(t, x) : \|x\|_2 \le t\}, \qquad
   Π(t, x) = \begin{cases} (t, x) & \|x\| \le t \\ 0 & \|x\| \le -t \\
             \tfrac12 (t + \|x\|)\,(1, x / \|x\|) & \text{else.} \end{cases}

Reference: Alizadeh and Goldfarb, Second-order cone programming, Mathematical Programming 95 (2003).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_rows

__all__ = ["projection_second_order_cone"]


def projection_second_order_cone(x: Tensor) -> Tensor:
    """The nearest point of {(t, x) : ‖x‖₂ ≤ t}, with t first.

    On the boundary of the cone the derivative is that of the inside (the identity), on the boundary of the polar cone it is zero.

    Args:
        x: ``(*batch, n)``, rows (t, x) with n ≥ 1.

    Returns:
        ``(*batch, n)``.

    Raises:
        ShapeError: x is not a floating tensor of rows.

    Example:
        >>> import torch
        >>> from difflayers.convex.projections import projection_second_order_cone
        >>> projection_second_order_cone(torch.tensor([0.0, 3.0, 4.0]))
        tensor([2.5000, 1.5000, 2.0000])
    """
    check_rows(x, "x", at_least=1)
    t, tail = x[..., :1], x[..., 1:]
    size = torch.linalg.vector_norm(tail.detach(), dim=-1, keepdim=True)
    inside, polar = size <= t, size <= -t
    # The norm is differentiated where it is not zero only.
    tail = torch.where(inside | polar, 1, tail)
    norm = torch.linalg.vector_norm(tail, dim=-1, keepdim=True)
    share = (t / norm + 1) / 2
    curved = torch.cat([(t + norm) / 2, share * tail], -1)
    return torch.where(inside, x, torch.where(polar, 0, curved))
