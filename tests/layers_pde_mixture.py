"""Mixtures of hard constraints as entries of the registry of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from difflayers.errors import NotConvergedError, SingularError
from difflayers.pde import HardConstraint, MixtureOfConstraints, dirichlet
from difflayers.solution import Status
from tests.layers import Failure, Function, Inputs, Layer, randn
from tests.reference import newton_root

__all__ = ["MIXTURES"]

_POINTS, _EXPERTS = 7, 2
_STEEP = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 0.2], dtype=torch.float64)
_LABELS = torch.tensor([0, 0, 0, 1, 0, 1, 1])


def _features(basis: Tensor, *args: Any) -> dict[str, Tensor]:
    # A linear map that reaches from point to point, as a derivative does.
    return {"u": basis, "v": (basis.roll(1, -2) - basis) / 0.3}


def _residual(z: dict[str, Tensor], source: Tensor, factor: Tensor, logits: Tensor | None = None) -> Tensor:
    return z["v"] + factor[..., None] * z["u"] ** 2 - source


def _left_value(source: Tensor, factor: Tensor, logits: Tensor | None = None) -> Tensor:
    return factor


def _router(basis: Tensor, source: Tensor, factor: Tensor, logits: Tensor) -> Tensor:
    return torch.stack([logits, -logits], -1)


def _mixture(routed: bool, **options: Any) -> MixtureOfConstraints:
    constraint = HardConstraint(_residual, features=_features, rows=[dirichlet(_left_value, dim=0, weight=2.0)], **options)
    return (
        MixtureOfConstraints(constraint, _router) if routed else MixtureOfConstraints(constraint, _LABELS, overlap=1, interface_weight=1.5)
    )


def _call(routed: bool, **fixed: Any) -> Function:
    def call(*inputs: Tensor, **options: Any) -> Tensor:
        return _mixture(routed, **({"tol": 1e-13} | fixed | options))(*inputs)

    return call


def _sample(routed: bool, g: torch.Generator) -> Inputs:
    basis = randn(g, _POINTS, 2) + torch.eye(_POINTS, 2, dtype=torch.float64)
    inputs = basis, randn(g, _POINTS, scale=0.3) - _STEEP, 0.3 + randn(g, scale=0.05)
    return (*inputs, randn(g, _POINTS, scale=0.5)) if routed else inputs


def _shares(logits: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What rows weigh, squared, and how solutions are blended, ``(experts, points)``, written out by hand."""
    if logits:
        share = torch.stack([logits[0], -logits[0]], -1).softmax(-1).mT
        return share, share
    first = torch.tensor([3, 3, 2, 1, 2, 1, 0], dtype=torch.float64) / 3
    phi = torch.stack([first, 1 - first])
    return (phi > 0).double(), phi


def _reference(routed: bool) -> Function:
    def gradient(w: Tensor, basis: Tensor, source: Tensor, factor: Tensor, *logits: Tensor) -> Tensor:
        def half(w: Tensor) -> Tensor:
            shares, _ = _shares(logits)
            values = [basis @ part for part in w.split(2)]
            total = torch.zeros_like(factor)
            for u, share in zip(values, shares, strict=True):
                r = (u.roll(1) - u) / 0.3 + factor * u**2 - source
                total = total + (share * r**2).sum() + 4 * (u[0] - factor) ** 2
            if not routed:
                total = total + 1.5**2 * ((values[0] - values[1])[2:6] ** 2).sum()
            return total / 2

        return torch.func.grad(half)(w)

    def reference(*inputs: Tensor) -> Tensor:
        weights = _mixture(routed, tol=1e-13).solve(*inputs).weights.detach().flatten()
        w = newton_root(gradient, weights, *inputs, steps=1).unflatten(0, (_EXPERTS, 2))
        _, phi = _shares(inputs[3:])
        return (phi * (w @ inputs[0].mT)).sum(0)

    return reference


def _layer(name: str, routed: bool) -> Layer:
    dependent = Failure("dependent", lambda b, *rest: (b[..., :1].expand_as(b).clone(), *rest), SingularError, (Status.SINGULAR,))
    nan = Failure("NaN", lambda b, s, f: (b, s * torch.nan, f), NotConvergedError, (Status.NUMERICAL_ERROR,))

    def limited(iterations: int) -> Function:
        return _call(routed, tol=0.0, max_iter=iterations, on_failure="warn")

    def module() -> nn.Module:
        return _mixture(routed)

    return Layer(
        name,
        _call(routed),
        lambda g: _sample(routed, g),
        reference=_reference(routed),
        # With interface rows the experts of a sample are one problem with one status.
        failures=() if routed else (dependent, nan),
        limited=limited,
        module=module,
        heavy=True,
    )


MIXTURES = (_layer("MixtureOfConstraints", False), _layer("MixtureOfConstraints, router", True))
