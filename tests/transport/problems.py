"""Costs and marginals that the transport tests share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COSTS", "marginal", "plain_sweeps", "random_cost"]


def random_cost(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def marginal(*shape: int, seed: int = 0) -> Tensor:
    return random_cost(*shape, seed=seed + 100).add(0.2).softmax(-1)


def _points() -> Tensor:
    return torch.cdist(random_cost(25, 2, seed=1), random_cost(30, 2, seed=2)) ** 2


def _same_points() -> Tensor:
    return torch.cdist(random_cost(30, 2, seed=3), random_cost(30, 2, seed=3)) ** 2


def _sorted_points() -> Tensor:
    line = torch.linspace(0, 1, 30, dtype=torch.float64)
    return (line[:, None] - line) ** 2


def _ties() -> Tensor:
    return torch.randint(0, 3, (20, 20), generator=torch.Generator().manual_seed(4)).double()


# Plans that are permutations, that have ties, that fall apart into groups, and plain ones.
COSTS = {
    "random": random_cost(30, 30),
    "tall": random_cost(40, 12),
    "wide": random_cost(12, 40),
    "points": _points(),
    "same points": _same_points(),
    "sorted points": _sorted_points(),
    "ties": _ties(),
    "constant": torch.ones(6, 6, dtype=torch.float64),
    "one row": random_cost(1, 5),
    "one": random_cost(1, 1),
}


def plain_sweeps(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, sweeps: int) -> tuple[Tensor, Tensor]:
    """Potentials by Sinkhorn's iteration in the log domain, as its definition has it."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(sweeps):
        f = epsilon * (a.log() - torch.logsumexp((g - cost) / epsilon, -1))
        g = epsilon * (b.log() - torch.logsumexp((f.unsqueeze(-1) - cost) / epsilon, -2))
    return f, g
