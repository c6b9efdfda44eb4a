"""Binary images to try skeletons on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["blobs", "noise", "tube"]


def noise(shape: tuple[int, ...], density: float, seed: int = 0) -> Tensor:
    """Independent voxels."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).float()


def blobs(shape: tuple[int, ...], density: float, seed: int = 0, smooth: int = 2) -> Tensor:
    """Smoothed noise above a quantile."""
    field = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    pool = functional.avg_pool2d if len(shape) == 4 else functional.avg_pool3d
    for _ in range(smooth):
        field = pool(functional.pad(field, (1,) * (2 * len(shape) - 4)), 3, stride=1)
    return (field > field.quantile(1 - density)).float()


def tube(size: int = 24, radius: float = 3.0) -> Tensor:
    """A closed ring of circular section, ``(1, 1, D, H, W)``."""
    axis = torch.arange(size) - (size - 1) / 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return ((((x**2 + y**2).sqrt() - size / 4) ** 2 + z**2).sqrt() < radius).float()[None, None]
