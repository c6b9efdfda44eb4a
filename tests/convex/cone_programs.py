"""Conic programs with a known solution: x, and v = s − y, are drawn, and P, q, A, b made to fit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers.convex import Cones
from difflayers.convex.cone_geometry import project

__all__ = ["KINDS", "Known", "known"]

# Each kind of cone, and all of them together, with enough unknowns for multipliers to be unique.
KINDS: dict[str, tuple[Cones, int]] = {
    "linear": (Cones(zero=2, nonneg=4), 6),
    "second order": (Cones(zero=1, nonneg=2, soc=(3, 4, 4)), 10),
    "semidefinite": (Cones(zero=1, psd=(3, 2)), 8),
    "exponential": (Cones(nonneg=1, exp=3), 10),
    "power": (Cones(zero=1, pow=(0.3, 0.6)), 7),
    "all": (Cones(1, 2, (3,), (2,), 1, (0.4,)), 14),
}


class Known(NamedTuple):
    """A program, and its solution."""

    P: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    x: Tensor
    y: Tensor
    s: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self[:4]


def known(cones: Cones, n: int, *batch: int, seed: int = 0, density: float = 1.0) -> Known:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    root, A, x, v = draw(n, n), draw(cones.rows, n), draw(n), 2 * draw(cones.rows)
    A = A * (torch.rand(cones.rows, n, generator=generator) < density)
    s = project(cones, v)
    P = root @ root.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)
    q = -(P @ x.unsqueeze(-1) + A.mT @ (s - v).unsqueeze(-1)).squeeze(-1)
    return Known(P, q, A, (A @ x.unsqueeze(-1)).squeeze(-1) + s, x, s - v, s)
