"""The proximal operators as entries of the registry of layers.

Operators that act entry by entry are entered with one entry, since each entry is a problem of its own, with its own status.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from difflayers.errors import NotConvergedError
from difflayers.prox.operators import (
    Prox,
    firm_threshold,
    group_sparse_envelope,
    hard_threshold,
    moreau_envelope,
    prox_conjugate,
    prox_elastic_net,
    prox_group_lasso,
    prox_group_sparse,
    prox_huber,
    prox_l0,
    prox_l2,
    prox_linf,
    prox_log,
    prox_lp,
    prox_nuclear,
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


def _group_sparse() -> Layer:
    # One group whole, two in the middle, one at zero.
    def call(x: Tensor, lam: Tensor, d: Tensor, **options: str) -> Tensor:
        return prox_group_sparse(x, lam, 2, torch.tensor([0, 1, 2, 1, 3]), d, **options)

    def reference(x: Tensor, lam: Tensor, d: Tensor) -> Tensor:
        norms = torch.stack([(x[1] ** 2 + x[3] ** 2).sqrt(), x[2].abs()])
        t = (d[1:3].sqrt() * norms).sum() / (1 + lam * d[1:3].sum())
        factor = 1 - lam * d[1:3].sqrt() * t / norms
        return torch.stack([x[0] / (1 + lam * d[0]), factor[0] * x[1], factor[1] * x[2], factor[0] * x[3], 0 * x[4]])

    inputs = _near([4.0, 1.0, -1.3, 0.8, 0.05], 0.5, [1.0, 1.2, 0.9, 1.1], scale=0.02)
    return Layer("prox_group_sparse", call, inputs, reference=reference, failures=(_negative(1), _negative(2)))


def _group_sparse_envelope() -> Layer:
    def call(x: Tensor, d: Tensor) -> Tensor:
        return group_sparse_envelope(x, 2, torch.tensor([0, 1, 2, 1]), d)

    def reference(x: Tensor, d: Tensor) -> Tensor:
        rest = d[1].sqrt() * (x[1] ** 2 + x[3] ** 2).sqrt() + d[2].sqrt() * x[2].abs()
        return (d[0] * x[0] ** 2 + rest**2) / 2

    return Layer("group_sparse_envelope", call, _near([4.0, 1.0, -1.3, 0.8], [1.0, 1.2, 0.9]), reference=reference)


def _nuclear() -> Layer:
    # Singular values near (2, 1.9, 0.1): two that are close, so that a derivative of the singular vectors would be large.
    def sample(g: torch.Generator) -> Inputs:
        U, V = torch.linalg.qr(randn(g, 3, 3)).Q, torch.linalg.qr(randn(g, 4, 4)).Q[:3]
        return (U * torch.tensor([2.0, 1.9, 0.1], dtype=torch.float64)) @ V + randn(g, 3, 4, scale=0.02), 0.8 + randn(g, scale=0.05)

    def reference(X: Tensor, lam: Tensor) -> Tensor:
        U, values, V = torch.linalg.svd(X, full_matrices=False)
        return (U * (values - lam).clamp(min=0)) @ V

    return Layer("prox_nuclear", prox_nuclear, sample, reference=reference, failures=(_negative(),), heavy=True)


def _lp(p: float) -> Layer:
    def reference(x: Tensor, lam: Tensor, p: Tensor) -> Tensor:
        u = prox_lp(x, lam, p).detach()
        for _ in range(3):
            u = u - (u + lam * p * u ** (p - 1) - x) / (1 + lam * p * (p - 1) * u ** (p - 2)).detach()
        return u

    return Layer(f"prox_lp, p = {p}", prox_lp, _near(2.0, 0.4, p), reference=reference, failures=(_negative(1), _negative(2)))


def _conjugate() -> Layer:
    def call(x: Tensor, gamma: Tensor) -> Tensor:
        return prox_conjugate(lambda v, s: prox_l2(v, s.squeeze(-1)), x, gamma.unsqueeze(-1))

    # ‖x‖ is larger than one.
    return Layer("prox_conjugate", call, _near([1.0, -0.7], 0.5), reference=lambda x, gamma: x / (x * x).sum().sqrt() + 0 * gamma)


def _envelope() -> Layer:
    def call(x: Tensor, gamma: Tensor, lam: Tensor) -> Tensor:
        gamma, lam = gamma.unsqueeze(-1), lam.unsqueeze(-1)
        return moreau_envelope(lambda u: (lam * u.abs()).sum(-1), lambda v, s: soft_threshold(v, s * lam), x, gamma)

    def reference(x: Tensor, gamma: Tensor, lam: Tensor) -> Tensor:
        return lam * x[0].abs() - gamma * lam**2 / 2 + x[1] ** 2 / (2 * gamma)

    return Layer("moreau_envelope", call, _near([1.0, 0.1], 0.5, 0.8), reference=reference)


def _module() -> Layer:
    def module() -> Prox:
        return Prox("l2", learn="lam", lam=torch.tensor(0.4, dtype=torch.float64))

    prox = module()

    def call(x: Tensor) -> Tensor:
        return prox(x) if x.dtype == torch.float64 else copy.deepcopy(prox).to(x.dtype)(x)

    return Layer("Prox", call, _near([1.0, -0.5, 0.7]), module=module, reference=lambda x: (1 - 0.4 / (x * x).sum().sqrt()) * x)


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
    _group_sparse(),
    _group_sparse_envelope(),
    _nuclear(),
    _entry(
        "prox_log",
        prox_log,
        *(2.0, 0.4, 0.3),
        reference=lambda x, lam, epsilon: (x - epsilon + ((x + epsilon) ** 2 - 4 * lam).sqrt()) / 2,
        failures=(_negative(1), _negative(2)),
    ),
    _lp(0.5),
    _lp(1.5),
    _conjugate(),
    _envelope(),
    _module(),
)
