"""Derivatives on meshes as entries of the registry of layers; the references are dense matrices, written down by other formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difflayers.pde import (
    chebyshev_derivative,
    chebyshev_points,
    edge_derivative,
    finite_difference,
    spectral_derivative,
)
from tests.layers import Inputs, Layer, randn

__all__ = ["PDE_DERIVATIVES"]


def _values_and_step(g: torch.Generator) -> Inputs:
    return randn(g, 5), 0.7 + randn(g, scale=0.05)


def _uniform() -> Layer:
    matrix = torch.tensor(
        [[2.0, -5, 4, -1, 0], [1, -2, 1, 0, 0], [0, 1, -2, 1, 0], [0, 0, 1, -2, 1], [0, -1, 4, -5, 2]], dtype=torch.float64
    )

    def call(u: Tensor, h: Tensor) -> Tensor:
        return finite_difference(u, h, order=2)

    return Layer("finite_difference", call, _values_and_step, leading=False, reference=lambda u, h: (matrix @ u) / h**2)


def _periodic() -> Layer:
    def call(u: Tensor) -> Tensor:
        return finite_difference(u, 0.5, accuracy=4, boundary="periodic")

    def reference(u: Tensor) -> Tensor:
        one, two = (torch.roll(u, -k, -1) - torch.roll(u, k, -1) for k in (1, 2))
        return (8 * one - two) / (12 * 0.5)

    return Layer("finite_difference, periodic", call, lambda g: (randn(g, 5),), reference=reference)


def _mesh() -> Layer:
    def sample(g: torch.Generator) -> Inputs:
        return randn(g, 4), torch.tensor([0.0, 0.5, 1.4, 2.0], dtype=torch.float64) + randn(g, 4, scale=0.05)

    def reference(u: Tensor, x: Tensor) -> Tensor:
        slopes = []
        for i, j in ((0, 0), (1, 0), (2, 1), (3, 1)):
            # The parabola through three points in Newton's form, differentiated at x_i.
            (a, b, c), (ua, ub, uc) = x[j : j + 3], u[j : j + 3]
            first, second = (ub - ua) / (b - a), (uc - ub) / (c - b)
            slopes.append(first + (second - first) / (c - a) * (2 * x[i] - a - b))
        return torch.stack(slopes)

    return Layer("finite_difference, coordinates", finite_difference, sample, leading=False, reference=reference)


def _edge() -> Layer:
    def call(u: Tensor, h: Tensor) -> Tensor:
        return edge_derivative(u, h, dim=-1, side="upper")

    return Layer("edge_derivative", call, _values_and_step, leading=False, reference=lambda u, h: (u[2] / 2 - 2 * u[3] + 3 * u[4] / 2) / h)


def _fourier() -> Layer:
    def reference(u: Tensor, length: Tensor) -> Tensor:
        n = u.shape[-1]
        steps = torch.arange(n, dtype=u.dtype).unsqueeze(-1) - torch.arange(n, dtype=u.dtype)
        waves = torch.arange(1, n // 2 + 1, dtype=u.dtype)
        matrix = -2 / n * (waves * torch.sin(2 * math.pi / n * waves * steps.unsqueeze(-1))).sum(-1)
        return 2 * math.pi / length * (matrix @ u)

    return Layer("spectral_derivative", spectral_derivative, _values_and_step, leading=False, reference=reference)


def _chebyshev() -> Layer:
    def reference(u: Tensor) -> Tensor:
        x = chebyshev_points(4)
        gaps = x.unsqueeze(-1) - x + torch.eye(4, dtype=x.dtype)
        weights = gaps.prod(-1)
        matrix = weights.unsqueeze(-1) / weights / gaps
        matrix = matrix - torch.diag(torch.diagonal(matrix))
        return (matrix - torch.diag(matrix.sum(-1))) @ u

    return Layer("chebyshev_derivative", chebyshev_derivative, lambda g: (randn(g, 4),), reference=reference)


PDE_DERIVATIVES = (_uniform(), _periodic(), _mesh(), _edge(), _fourier(), _chebyshev())
