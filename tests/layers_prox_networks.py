"""The networks of the prox family, in point and parameters: gradients of convex functions, inverses, proximal operators, priors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from difflayers.errors import NotConvergedError
from difflayers.prox import ConvexGradientNetwork
from difflayers.solution import Status
from tests.layers import Failure, Inputs, Layer, randn
from tests.reference import newton_root

__all__ = ["PROX_NETWORKS", "MethodOf"]


class MethodOf(nn.Module):
    """A method of a network as a module."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, x: Tensor, *, on_failure: str = "raise", **options: Any) -> Tensor:
        self.network.on_failure = on_failure
        return getattr(self.network, self.method)(x, **options)


def _network(**options: Any) -> ConvexGradientNetwork:
    return ConvexGradientNetwork(2, 4, groups=2, strong_convexity=0.3, **options).double()


def _parameters(g: torch.Generator) -> Inputs:
    """M, b and g₀: two rows of A, four of W."""
    quadratic = torch.tensor([[0.6, 0.2], [0.0, 0.5]], dtype=torch.float64)
    ridges = torch.tensor([[1.0, 0.3], [-0.7, 0.6], [0.2, -1.1], [0.5, 0.8]], dtype=torch.float64)
    return torch.cat([quadratic, ridges]) + randn(g, 6, 2, scale=0.05), randn(g, 4, scale=0.3), randn(g, 2, scale=0.2)


def _gradient(x: Tensor, M: Tensor, b: Tensor, g0: Tensor) -> Tensor:
    A, W = M[:2], M[2:] * 2**0.5
    return W.mT @ (W @ x + b).reshape(2, 2).softmax(-1).flatten() + A.mT @ (A @ x) + 0.3 * x + g0


def _potential(x: Tensor, M: Tensor, b: Tensor, g0: Tensor) -> Tensor:
    A, W = M[:2], M[2:] * 2**0.5
    return (W @ x + b).reshape(2, 2).logsumexp(-1).sum() + (A @ x).square().sum() / 2 + 0.15 * x.square().sum() + g0 @ x


def _inverse(x: Tensor, *parameters: Tensor) -> Tensor:
    return newton_root(lambda y, x, *parameters: _gradient(y, *parameters) - x, x.detach(), x, *parameters)


def _prior(x: Tensor, *parameters: Tensor) -> Tensor:
    y = _inverse(x, *parameters)
    return x @ y - x @ x / 2 - _potential(y, *parameters)


def _limited(M: Tensor) -> Tensor:
    """‖M‖² is more than 1.2 − 0.3: the limit is active."""
    return M * (0.9 / torch.linalg.eigvalsh(M.mT @ M)[-1]).sqrt()


def _prox(x: Tensor, gamma: Tensor, M: Tensor, *rest: Tensor) -> Tensor:
    def residual(y: Tensor, x: Tensor, gamma: Tensor, *parameters: Tensor) -> Tensor:
        return gamma * y + (1 - gamma) * _gradient(y, *parameters) - x

    parameters = (_limited(M), *rest)
    return _gradient(newton_root(residual, x.detach(), x, gamma, *parameters), *parameters)


def _not_finite(x: Tensor, *rest: Tensor) -> Inputs:
    return (x * torch.nan, *rest)


_NAN = Failure("NaN", _not_finite, NotConvergedError, (Status.NUMERICAL_ERROR,))


def _convex_gradient() -> tuple[Layer, ...]:
    def calls(method: str, **options: Any):
        module = MethodOf(_network(**options), method)

        def call(x: Tensor, M: Tensor, b: Tensor, g0: Tensor, **options: Any) -> Tensor:
            return functional_call(module, {"network.matrix": M, "network.bias": b, "network.offset": g0}, x, options)

        return call

    def sample(g: torch.Generator) -> Inputs:
        return (randn(g, 2), *_parameters(g))

    limited = calls("prox", lipschitz=1.2)

    def prox(x: Tensor, gamma: Tensor, *parameters: Tensor, **options: str) -> Tensor:
        return limited(x, *parameters, gamma=gamma, **options)

    def sample_prox(g: torch.Generator) -> Inputs:
        return (randn(g, 2), 1.7 + randn(g, scale=0.1), *_parameters(g))

    name = "ConvexGradientNetwork"
    failures = (_NAN,)
    return (
        Layer(name, calls("forward"), sample, leading=False, reference=_gradient),
        Layer(f"{name}.inverse", calls("inverse"), sample, leading=False, reference=_inverse, failures=failures, heavy=True),
        Layer(f"{name}.prior", calls("prior"), sample, leading=False, reference=_prior, failures=failures, heavy=True),
        Layer(
            f"{name}.prox",
            prox,
            sample_prox,
            leading=False,
            reference=_prox,
            failures=(
                *failures,
                Failure("gamma", lambda x, gamma, *rest: (x, gamma + 10, *rest), NotConvergedError, (Status.NUMERICAL_ERROR,)),
            ),
            heavy=True,
        ),
    )


PROX_NETWORKS: tuple[Layer, ...] = _convex_gradient()
