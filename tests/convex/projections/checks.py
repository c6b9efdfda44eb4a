"""What the tests of projections share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rows", "wide_rows"]


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wide_rows(*shape: int, seed: int) -> Tensor:
    """Entries of all magnitudes from 1e-8 to 1e8."""
    generator = torch.Generator().manual_seed(seed)
    exponents = 16 * torch.rand(shape, generator=generator, dtype=torch.float64) - 8
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 10**exponents
