"""Costs of moving the points of one cloud to those of another."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["distances", "squared_distances"]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``(*batch, n, m)``; by products, which is exact enough beside ε once the origin is among the points.

    Args:
        x: ``(*batch, n, d)``.
        y: ``(*batch, m, d)``.
    """
    center = y.detach().mean(-2, keepdim=True)
    x, y = x - center, y - center
    return (x * x).sum(-1, keepdim=True) + (y * y).sum(-1).unsqueeze(-2) - 2 * (x @ y.mT)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """By differences, and with the slope zero where points coincide: ``(*batch, n, m)``.

    Args:
        x: ``(*batch, n, d)``.
        y: ``(*batch, m, d)``.
    """
    squares = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), 0)
