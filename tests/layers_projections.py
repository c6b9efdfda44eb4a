"""The projections as entries of the registry of layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from difflayers.convex.projections import (
    projection_exponential_cone,
    projection_power_cone,
    projection_psd_cone,
    projection_second_order_cone,
)
from tests.layers import Inputs, Layer, randn
from tests.reference import newton_root

__all__ = ["PROJECTIONS"]


def _near(*values: float, scale: float = 0.1) -> Callable[[torch.Generator], Inputs]:
    """Draws points near ``values``."""
    return lambda g: (torch.tensor(values, dtype=torch.float64) + randn(g, len(values), scale=scale),)


def _second_order() -> Layer:
    def reference(v: Tensor) -> Tensor:
        norm = (v[1:] ** 2).sum().sqrt()
        return (v[0] + norm) / 2 * torch.cat([torch.ones_like(v[:1]), v[1:] / norm])

    return Layer("projection_second_order_cone", projection_second_order_cone, _near(0.3, 1.0, -0.6), reference=reference)


def _psd() -> Layer:
    # Eigenvalues near (2, 2, −1): two that are close, so that a derivative of the eigenvectors would be large.
    def sample(g: torch.Generator) -> Inputs:
        Q = torch.linalg.qr(randn(g, 3, 3)).Q
        return ((Q * torch.tensor([2.0, 1.9, -1.0], dtype=torch.float64)) @ Q.mT + randn(g, 3, 3, scale=0.05),)

    def reference(X: Tensor) -> Tensor:
        values, Q = torch.linalg.eigh((X + X.mT) / 2)
        return (Q * values.clamp(min=0)) @ Q.mT

    return Layer("projection_psd_cone", projection_psd_cone, sample, reference=reference)


def _exponential() -> Layer:
    def kkt(s: Tensor, v: Tensor) -> Tensor:
        x, y, z, multiplier = s
        growth = torch.exp(x / y)
        normal = torch.stack([growth, growth * (1 - x / y), -torch.ones_like(growth)])
        return torch.cat([s[:3] - v + multiplier * normal, (y * growth - z).reshape(1)])

    def reference(v: Tensor) -> Tensor:
        point = projection_exponential_cone(v).detach()
        return newton_root(kkt, torch.cat([point, (point - v.detach())[2:]]), v, steps=1)[:3]

    return Layer("projection_exponential_cone", projection_exponential_cone, _near(1.0, 0.5, 0.3), reference=reference)


def _power() -> Layer:
    def kkt(s: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        x, y, z, multiplier = s
        mean = x**alpha * y ** (1 - alpha)
        normal = torch.stack([-alpha * mean / x, -(1 - alpha) * mean / y, torch.ones_like(mean)])
        return torch.cat([s[:3] - v + multiplier * normal, (z - mean).reshape(1)])

    def reference(v: Tensor, alpha: Tensor) -> Tensor:
        point = projection_power_cone(v, alpha).detach()
        return newton_root(kkt, torch.cat([point, (v.detach() - point)[2:]]), v, alpha, steps=1)[:3]

    def sample(g: torch.Generator) -> Inputs:
        return torch.tensor([0.5, -0.3, 1.0], dtype=torch.float64) + randn(g, 3, scale=0.1), 0.4 + randn(g, scale=0.05)

    return Layer("projection_power_cone", projection_power_cone, sample, reference=reference)


PROJECTIONS: tuple[Layer, ...] = (_second_order(), _psd(), _exponential(), _power())
