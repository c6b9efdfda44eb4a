"""Total variation as entries of the registry of layers."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.prox.operators import prox_tv1d
from tests.layers import Inputs, Layer, randn

__all__ = ["TOTAL_VARIATION"]


def _sequence() -> Layer:
    # Two entries on one level, then a fall and a rise.
    def sample(g: torch.Generator) -> Inputs:
        x = torch.tensor([1.0, 1.1, -1.0, 2.0], dtype=torch.float64) + randn(g, 4, scale=0.05)
        return x, 0.3 + randn(g, scale=0.02), torch.tensor([1.0, 0.7, 1.5], dtype=torch.float64) + randn(g, 3, scale=0.05)

    def reference(x: Tensor, lam: Tensor, weights: Tensor) -> Tensor:
        fall, rise = lam * weights[1], lam * weights[2]
        pair = ((x[0] + x[1]) - fall) / 2
        return torch.stack([pair, pair, x[2] + fall + rise, x[3] - rise])

    return Layer("prox_tv1d", prox_tv1d, sample, reference=reference)


TOTAL_VARIATION = (_sequence(),)
