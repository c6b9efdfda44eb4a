"""Total variation as entries of the registry of layers."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.errors import NotConvergedError
from difflayers.prox.operators import prox_tv1d, prox_tv2d
from difflayers.solution import Status
from tests.layers import Failure, Function, Inputs, Layer, randn
from tests.reference import newton_root

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

    failure = Failure("negative", lambda x, lam, weights: (x, -lam, weights), NotConvergedError, (Status.NUMERICAL_ERROR,))
    return Layer("prox_tv1d", prox_tv1d, sample, reference=reference, failures=(failure,))


def _with_norm(norm: str) -> Function:
    return lambda x, lam, weights, **options: prox_tv2d(x, lam, weights, norm=norm, tol=1e-5, polish=True, **options)


_FAILURES = (Failure("not finite", lambda x, lam, weights: (x / 0, lam, weights), NotConvergedError, (Status.NUMERICAL_ERROR,)),)


def _sample(g: torch.Generator, x: list[list[float]]) -> Inputs:
    image = torch.tensor(x, dtype=torch.float64)
    return image + randn(g, *image.shape, scale=0.02), 0.3 + randn(g, scale=0.02), 1 + randn(g, *image.shape, scale=0.05)


def _anisotropic() -> Layer:
    # The upper two pixels are one region; the lower ones are below it, the right one lowest.
    def reference(x: Tensor, lam: Tensor, weights: Tensor) -> Tensor:
        (left, right), (below, _) = lam * weights
        upper = (x[0, 0] + x[0, 1] - left - right) / 2
        return torch.stack([upper, upper, x[1, 0] + left - below, x[1, 1] + right + below]).reshape(2, 2)

    return Layer(
        "prox_tv2d_anisotropic",
        _with_norm("anisotropic"),
        lambda g: _sample(g, [[1.0, 1.05], [-1.0, -2.5]]),
        reference=reference,
        failures=_FAILURES,
    )


def _isotropic() -> Layer:
    # All four pixels are apart.
    def stationarity(u: Tensor, x: Tensor, lam: Tensor, weights: Tensor) -> Tensor:
        (a, b), (c, d) = u.reshape(2, 2)
        w = lam * weights
        across, down = (w[0, 0] * part / torch.sqrt((b - a) ** 2 + (c - a) ** 2) for part in (b - a, c - a))
        right, below = w[0, 1] * torch.sign(d - b), w[1, 0] * torch.sign(d - c)
        return u - x.flatten() + torch.stack([-across - down, across - right, down - below, right + below])

    def reference(x: Tensor, lam: Tensor, weights: Tensor) -> Tensor:
        start = prox_tv2d(x.detach(), lam.detach(), weights.detach()).flatten()
        return newton_root(stationarity, start, x, lam, weights).reshape(2, 2)

    return Layer(
        "prox_tv2d",
        _with_norm("isotropic"),
        lambda g: _sample(g, [[1.0, 2.0], [-0.5, -2.0]]),
        reference=reference,
        failures=_FAILURES,
    )


def _isotropic_with_a_region() -> Layer:
    return Layer("prox_tv2d_region", _with_norm("isotropic"), lambda g: _sample(g, [[1.0, 1.05, 0.2], [1.0, -1.1, 0.9]]), heavy=True)


TOTAL_VARIATION = (_sequence(), _anisotropic(), _isotropic(), _isotropic_with_a_region())
