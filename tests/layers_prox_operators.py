"""The proximal operators as entries of the registry of layers.

Operators that act entry by entry are entered with one entry, since each entry is a problem of its own, with its own status.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from difflayers.errors import NotConvergedError
from difflayers.prox.operators import (
    firm_threshold,
    hard_threshold,
    prox_elastic_net,
    prox_group_lasso,
    prox_huber,
    prox_l0,
    prox_l2,
    prox_linf,
    prox_squared_l2,
    soft_threshold,
    top_k_abs,
)
from difflayers.solution import Status
from tests.layers import Failure, Function, Inputs, Layer, randn

__all__ = ["PROX_OPERATORS"]


def _near(*centers: float | list[float], scale: float = 0.05) -> Callable[[torch.Generator], Inputs]:
    """Draws inputs near ``centers``."""

    def sample(g: torch.Generator) -> Inputs:
        values = [torch.tensor(center, dtype=torch.float64) for center in centers]
        return tuple(value + randn(g, *value.shape, scale=scale) for value in values)

    return sample


def _negative(position: int = 1) -> Failure:
    def spoil(*inputs: Tensor) -> Inputs:
        return tuple(-part if i == position else part for i, part in enumerate(inputs))

    return Failure(f"negative input {position}", spoil, NotConvergedError, (Status.NUMERICAL_ERROR,))


def _entry(name: str, operator: Function, *centers: float, reference: Function, failures: tuple[Failure, ...] = (_negative(),)) -> Layer:
    return Layer(name, operator, _near(*centers), reference=reference, failures=failures)


def _soft() -> Layer:
    def reference(x: Tensor, lam: Tensor) -> Tensor:
        return torch.stack([x[0] - lam[0], x[1] + lam[1], 0 * x[2]])

    return Layer("soft_threshold, a weight each", soft_threshold, _near([1.0, -0.8, 0.1], [0.3, 0.4, 0.5]), reference=reference)


def _top_k() -> Layer:
    def reference(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=x.dtype)

    return Layer("top_k_abs", lambda x: top_k_abs(x, 2), _near([1.0, 0.2, -0.8, -0.3]), reference=reference)


def _l2() -> Layer:
    return Layer(
        "prox_l2",
        prox_l2,
        _near([1.0, -0.7, 0.5], 0.4),
        reference=lambda x, lam: (1 - lam / (x * x).sum().sqrt()) * x,
        failures=(_negative(),),
    )


def _linf() -> Layer:
    def reference(x: Tensor, lam: Tensor) -> Tensor:
        level = (x[0] - x[1] - lam) / 2
        return torch.stack([level, -level, x[2]])

    return Layer("prox_linf", prox_linf, _near([1.0, -0.9, 0.2], 0.6), reference=reference, failures=(_negative(),))


def _group_lasso() -> Layer:
    # The second group vanishes.
    def call(x: Tensor, lam: Tensor, w: Tensor, **options: str) -> Tensor:
        return prox_group_lasso(x, lam, torch.tensor([0, 1, 0]), w, **options)

    def reference(x: Tensor, lam: Tensor, w: Tensor) -> Tensor:
        factor = 1 - lam * w[0] / (x[0] ** 2 + x[2] ** 2).sqrt()
        return torch.stack([factor * x[0], 0 * x[1], factor * x[2]])

    failures = (_negative(1), _negative(2))
    return Layer("prox_group_lasso", call, _near([1.0, 0.1, -0.7], 0.5, [0.8, 1.2]), reference=reference, failures=failures)


PROX_OPERATORS: tuple[Layer, ...] = (
    _entry("soft_threshold", soft_threshold, 1.0, 0.4, reference=lambda x, lam: x - lam),
    _soft(),
    # These do not depend on their weights, but for the jumps.
    Layer("hard_threshold", lambda x: hard_threshold(x, 0.4), _near([1.0, -0.7, 0.1]), reference=lambda x: torch.cat([x[:2], 0 * x[2:]])),
    Layer("prox_l0", lambda x: prox_l0(x, 0.2), _near([1.0, -0.7, 0.1]), reference=lambda x: torch.cat([x[:2], 0 * x[2:]])),
    _entry(
        "firm_threshold",
        firm_threshold,
        *(1.0, 0.5, 1.6),
        reference=lambda x, lam, mu: mu * (x - lam) / (mu - lam),
        failures=(_negative(1), _negative(2)),
    ),
    _top_k(),
    _l2(),
    _entry("prox_squared_l2", prox_squared_l2, 1.0, 0.4, reference=lambda x, lam: x / (1 + lam)),
    _linf(),
    _entry(
        "prox_elastic_net",
        prox_elastic_net,
        *(-1.0, 0.4, 0.7),
        reference=lambda x, lam1, lam2: (x + lam1) / (1 + lam2),
        failures=(_negative(1), _negative(2)),
    ),
    _entry(
        "prox_huber",
        prox_huber,
        *(2.0, 0.4, 0.7),
        reference=lambda x, lam, delta: x - lam * delta,
        failures=(_negative(1), _negative(2)),
    ),
    _group_lasso(),
)
