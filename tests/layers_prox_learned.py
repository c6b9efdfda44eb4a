"""Proximal networks on convex networks, in point and weights: denoiser, inverse, prior, potential, proximal operator of any step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import softplus

from difflayers.errors import NotConvergedError
from difflayers.implicit import implicit_root, stationary_value
from difflayers.prox import ConvolutionalInputConvexNN, InputConvexNN, LearnedProximalNetwork, NonexpansiveProximalNetwork
from difflayers.solution import Status
from tests.layers import Failure, Function, Inputs, Layer, randn
from tests.layers_prox_networks import MethodOf
from tests.reference import newton_root

__all__ = ["PROX_LEARNED"]

_MU = 0.3
_NAN = Failure("NaN", lambda x, *rest: (x * torch.nan, *rest), NotConvergedError, (Status.NUMERICAL_ERROR,))
_NEGATIVE = Failure("gamma", lambda x, gamma, *rest: (x, gamma - 10, *rest), NotConvergedError, (Status.NUMERICAL_ERROR,))


def _psi() -> InputConvexNN:
    return InputConvexNN(2, hidden=3, layers=2, beta=2.0).double()


def _weights(g: torch.Generator) -> Inputs:
    """H₁ above H₂, b₁ and b₂, V₁ above v."""
    return randn(g, 6, 2), randn(g, 2, 3, scale=0.3), 0.7 + randn(g, 4, 3, scale=0.1)


def _named(H: Tensor, b: Tensor, V: Tensor) -> dict[str, Tensor]:
    return {
        "network.network.skips.0.weight": H[:3],
        "network.network.skips.1.weight": H[3:],
        "network.network.skips.0.bias": b[0],
        "network.network.skips.1.bias": b[1],
        "network.network.paths.0.parametrizations.weight.original": V[:3],
        "network.network.readout.parametrizations.weight.original": V[3:],
        "network.network.offset": torch.full((2,), 0.2, dtype=H.dtype),
    }


def _call(network: nn.Module, method: str) -> Function:
    module = MethodOf(network, method)

    def call(x: Tensor, H: Tensor, b: Tensor, V: Tensor, **options: Any) -> Tensor:
        return functional_call(module, _named(H, b, V), x, options)

    return call


def _phi(x: Tensor, H: Tensor, b: Tensor, V: Tensor) -> Tensor:
    """The potential of one point, written once more."""
    z = softplus(H[:3] @ x + b[0], 2.0, threshold=40.0)
    z = softplus(V[:3].square() @ z + H[3:] @ x + b[1], 2.0, threshold=40.0)
    return V[3].square() @ z.square() / 2 + 0.2 * x.sum() + _MU / 2 * x @ x


_slope = grad(_phi)


def _inverse(x: Tensor, *weights: Tensor) -> Tensor:
    return newton_root(lambda y, x, *weights: _slope(y, *weights) - x, x.detach(), x, *weights)


def _prior(x: Tensor, *weights: Tensor) -> Tensor:
    y = _inverse(x, *weights)
    return x @ y - _phi(y, *weights) - x @ x / 2


def _prox(x: Tensor, gamma: Tensor, *weights: Tensor) -> Tensor:
    def residual(y: Tensor, x: Tensor, gamma: Tensor, *weights: Tensor) -> Tensor:
        return gamma * y + (1 - gamma) * _slope(y, *weights) - x

    return _slope(newton_root(residual, x.detach(), x, gamma, *weights), *weights)


def _resolvent(x: Tensor, *weights: Tensor) -> Tensor:
    return newton_root(lambda u, x, *weights: u + _slope(u, *weights) - x, x.detach(), x, *weights)


def _resolvent_potential(x: Tensor, *weights: Tensor) -> Tensor:
    u = _resolvent(x, *weights)
    return x @ u - u @ u / 2 - _phi(u, *weights)


def _learned() -> tuple[Layer, ...]:
    network, name = LearnedProximalNetwork(_psi(), _MU), "LearnedProximalNetwork"
    step = _call(network, "prox")

    def prox(x: Tensor, gamma: Tensor, *weights: Tensor, **options: str) -> Tensor:
        return step(x, *weights, gamma=gamma, **options)

    def sample(g: torch.Generator) -> Inputs:
        return (randn(g, 2), *_weights(g))

    def sample_prox(g: torch.Generator) -> Inputs:
        return (randn(g, 2), 0.6 + randn(g, scale=0.1), *_weights(g))

    options: dict[str, Any] = {"leading": False, "heavy": True}
    return (
        Layer(name, _call(network, "forward"), sample, leading=False, reference=_slope),
        Layer(f"{name}.inverse", _call(network, "inverse"), sample, reference=_inverse, failures=(_NAN,), **options),
        Layer(f"{name}.prior", _call(network, "prior"), sample, reference=_prior, failures=(_NAN,), **options),
        Layer(f"{name}.prox", prox, sample_prox, reference=_prox, failures=(_NAN, _NEGATIVE), **options),
    )


def _nonexpansive() -> tuple[Layer, ...]:
    network, name = NonexpansiveProximalNetwork(_psi(), _MU), "NonexpansiveProximalNetwork"

    def sample(g: torch.Generator) -> Inputs:
        return (randn(g, 2), *_weights(g))

    options: dict[str, Any] = {"leading": False, "heavy": True}
    return (
        Layer(name, _call(network, "forward"), sample, reference=_resolvent, failures=(_NAN,), **options),
        Layer(f"{name}.potential", _call(network, "potential"), sample, reference=_resolvent_potential, failures=(_NAN,), **options),
    )


def _modules() -> tuple[Layer, ...]:
    """As modules, in the point alone; the image is of odd size, on which a stride drops pixels."""

    def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def module() -> nn.Module:
            torch.manual_seed(0)
            return make().double()

        return module

    def on(module: nn.Module) -> Function:
        def call(x: Tensor) -> Tensor:
            state = {name: part.to(x.dtype) for name, part in module.state_dict().items()}
            return functional_call(module, state, (x,))

        return call

    image: dict[str, Any] = {"beta": 2.0, "padding_mode": "reflect"}
    modules = {
        "LearnedProximalNetwork, module": (lambda: LearnedProximalNetwork(_psi(), _MU), (2,)),
        "NonexpansiveProximalNetwork, module": (lambda: NonexpansiveProximalNetwork(_psi(), _MU), (2,)),
        "LearnedProximalNetwork, images": (
            lambda: LearnedProximalNetwork(ConvolutionalInputConvexNN(1, 2, (1, 2), **image), _MU),
            (1, 3, 2),
        ),
    }
    return tuple(
        Layer(name, on(seeded(make)()), functools.partial(_point, shape), module=seeded(make), heavy=True)
        for name, (make, shape) in modules.items()
    )


def _point(shape: tuple[int, ...], g: torch.Generator) -> Inputs:
    return (randn(g, *shape),)


def _envelope() -> Layer:
    # Φ = Σ log cosh(y) + ‖y − Mx‖²/2 at its minimum; M is closed over.
    def call(x: Tensor, M: Tensor) -> Tensor:
        def objective(y: Tensor, x: Tensor) -> Tensor:
            gap = y - (M @ x.unsqueeze(-1)).squeeze(-1)
            return (torch.logaddexp(y, -y) + gap * gap / 2).sum(-1)

        return stationary_value(objective, minimizer(torch.zeros_like(x), x, M), x)

    def stationarity(y: Tensor, x: Tensor, M: Tensor) -> Tensor:
        return torch.tanh(y) + y - (M @ x.unsqueeze(-1)).squeeze(-1)

    minimizer = implicit_root(stationarity, symmetric=True)

    def reference(x: Tensor, M: Tensor) -> Tensor:
        y = newton_root(stationarity, torch.zeros_like(x), x, M)
        return (torch.logaddexp(y, -y) + (y - M @ x).square() / 2).sum(-1)

    return Layer("stationary_value", call, lambda g: (randn(g, 2), randn(g, 2, 2)), leading=False, reference=reference)


PROX_LEARNED: tuple[Layer, ...] = (*_learned(), *_nonexpansive(), *_modules(), _envelope())
