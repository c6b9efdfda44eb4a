"""The projections as entries of the registry of layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from difflayers.convex.projections import (
    Projection,
    projection_affine_set,
    projection_box,
    projection_box_section,
    projection_exponential_cone,
    projection_halfspace,
    projection_isotonic,
    projection_l1_ball,
    projection_l2_ball,
    projection_polyhedron,
    projection_power_cone,
    projection_psd_cone,
    projection_second_order_cone,
    projection_simplex,
    projection_transport,
)
from difflayers.errors import InfeasibleError, NotConvergedError
from difflayers.solution import Status
from tests.layers import Failure, Function, Inputs, Layer, randn
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


def _infeasible(name: str, spoil: Function) -> Failure:
    return Failure(name, spoil, InfeasibleError, (Status.PRIMAL_INFEASIBLE,))


def _simplex() -> Layer:
    # The third entry is not in the support.
    def sample(g: torch.Generator) -> Inputs:
        return torch.tensor([1.0, 0.7, -2.0], dtype=torch.float64) + randn(g, 3, scale=0.1), 1.2 + randn(g, scale=0.1)

    def reference(x: Tensor, r: Tensor) -> Tensor:
        return torch.cat([x[:2] - (x[:2].sum() - r) / 2, torch.zeros_like(x[2:])])

    failure = _infeasible("negative radius", lambda x, r: (x, -r))
    return Layer(
        "projection_simplex",
        projection_simplex,
        sample,
        reference=reference,
        failures=(failure,),
    )


def _l1_ball() -> Layer:
    def sample(g: torch.Generator) -> Inputs:
        return torch.tensor([1.0, -0.7, 0.02], dtype=torch.float64) + randn(g, 3, scale=0.05), 0.9 + randn(g, scale=0.1)

    def reference(x: Tensor, r: Tensor) -> Tensor:
        step = (x[0] - x[1] - r) / 2
        return torch.stack([x[0] - step, x[1] + step, torch.zeros_like(step)])

    failure = _infeasible("negative radius", lambda x, r: (x, -r))
    return Layer("projection_l1_ball", projection_l1_ball, sample, reference=reference, failures=(failure,))


def _l2_ball() -> Layer:
    def sample(g: torch.Generator) -> Inputs:
        return torch.tensor([1.0, -0.7, 0.5], dtype=torch.float64) + randn(g, 3, scale=0.1), 0.9 + randn(g, scale=0.05)

    failure = _infeasible("negative radius", lambda x, r: (x, -r))
    return Layer("projection_l2_ball", projection_l2_ball, sample, reference=lambda x, r: r * x / (x * x).sum().sqrt(), failures=(failure,))


def _box() -> Layer:
    def call(x: Tensor, lower: Tensor, upper: Tensor, **options: str) -> Tensor:
        return projection_box(x, (lower, upper), **options)

    def sample(g: torch.Generator) -> Inputs:
        x = torch.tensor([-2.0, 0.1, 2.0], dtype=torch.float64)
        return x + randn(g, 3, scale=0.1), -1 + randn(g, 3, scale=0.1), 1 + randn(g, 3, scale=0.1)

    return Layer(
        "projection_box",
        call,
        sample,
        reference=lambda x, lower, upper: torch.stack([lower[0], x[1], upper[2]]),
        failures=(_infeasible("crossed bounds", lambda x, lower, upper: (x, upper, lower)),),
    )


def _halfspace() -> Layer:
    def call(x: Tensor, a: Tensor, b: Tensor, **options: str) -> Tensor:
        return projection_halfspace(x, (a, b), **options)

    def sample(g: torch.Generator) -> Inputs:
        return 1 + randn(g, 3, scale=0.2), 1 + randn(g, 3, scale=0.2), 0.5 + randn(g, scale=0.1)

    return Layer(
        "projection_halfspace",
        call,
        sample,
        reference=lambda x, a, b: x - ((a * x).sum() - b) / (a * a).sum() * a,
        failures=(_infeasible("no normal", lambda x, a, b: (x, 0 * a, -b)),),
    )


def _box_section() -> Layer:
    # One entry at each bound, three between them.
    def call(x: Tensor, lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, **options: str) -> Tensor:
        return projection_box_section(x, (lower, upper, w, c), **options)

    def sample(g: torch.Generator) -> Inputs:
        x = torch.tensor([3.0, -3.0, 0.1, 0.2, -0.1], dtype=torch.float64)
        w = torch.tensor([1.0, 0.8, 1.2, -0.9, 0.7], dtype=torch.float64)
        edges = (-1 + randn(g, 5, scale=0.05), 1 + randn(g, 5, scale=0.05))
        return x + randn(g, 5, scale=0.05), *edges, w + randn(g, 5, scale=0.05), 0.3 + randn(g, scale=0.05)

    def reference(x: Tensor, lower: Tensor, upper: Tensor, w: Tensor, c: Tensor) -> Tensor:
        step = (w[0] * upper[0] + w[1] * lower[1] + (w[2:] * x[2:]).sum() - c) / (w[2:] * w[2:]).sum()
        return torch.cat([upper[:1], lower[1:2], x[2:] - step * w[2:]])

    return Layer(
        "projection_box_section",
        call,
        sample,
        reference=reference,
        failures=(
            _infeasible("out of reach", lambda x, lower, upper, w, c: (x, lower, upper, w, c + 100)),
            _infeasible("crossed bounds", lambda x, lower, upper, w, c: (x, upper, lower, w, c)),
        ),
    )


def _affine_set() -> Layer:
    def call(x: Tensor, A: Tensor, b: Tensor, **options: str) -> Tensor:
        return projection_affine_set(x, (A, b), **options)

    def sample(g: torch.Generator) -> Inputs:
        return randn(g, 3), torch.eye(2, 3, dtype=torch.float64) + randn(g, 2, 3, scale=0.2), randn(g, 2)

    def contradictory(x: Tensor, A: Tensor, b: Tensor) -> Inputs:
        return x, torch.stack([A[0], A[0]]), torch.stack([b[0], b[0] + 1])

    return Layer(
        "projection_affine_set",
        call,
        sample,
        reference=lambda x, A, b: x - A.mT @ (torch.linalg.inv(A @ A.mT) @ (A @ x - b)),
        failures=(_infeasible("contradictory rows", contradictory),),
    )


def _polyhedron() -> Layer:
    def call(x: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, **options: str) -> Tensor:
        return projection_polyhedron(x, (A, b, G, h), **options)

    def sample(g: torch.Generator) -> Inputs:
        A = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64) + randn(g, 1, 3, scale=0.1)
        G = torch.tensor([[1.0, 0.0, -0.2], [0.0, -1.0, 0.3]], dtype=torch.float64) + randn(g, 2, 3, scale=0.1)
        x = torch.tensor([2.0, 0.5, -0.5], dtype=torch.float64) + randn(g, 3, scale=0.1)
        return x, A, 1 + randn(g, 1, scale=0.1), G, torch.tensor([0.5, 3.0], dtype=torch.float64) + randn(g, 2, scale=0.1)

    def reference(x: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
        # The first inequality is active, the second is not.
        rows, values = torch.cat([A, G[:1]]), torch.cat([b, h[:1]])
        return x - rows.mT @ (torch.linalg.inv(rows @ rows.mT) @ (rows @ x - values))

    def empty(x: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Inputs:
        return x, A, b, torch.stack([G[0], -G[0]]), torch.full_like(h, -1.0)

    return Layer(
        "projection_polyhedron",
        call,
        sample,
        reference=reference,
        failures=(
            _infeasible("empty", empty),
            Failure("NaN", lambda x, *rest: (x * torch.nan, *rest), NotConvergedError, (Status.NUMERICAL_ERROR,)),
        ),
        heavy=True,
    )


def _transport() -> Layer:
    # The marginals are made of free numbers, so that their sums agree whatever these are.
    def call(S: Tensor, left: Tensor, right: Tensor, **options: str) -> Tensor:
        a, b = left * right.sum(-1, keepdim=True), right * left.sum(-1, keepdim=True)
        return projection_transport(S, (a, b), **options)

    def sample(g: torch.Generator) -> Inputs:
        S = torch.tensor([[1.0, 0.0, -0.5], [0.2, 0.9, 0.6]], dtype=torch.float64) + randn(g, 2, 3, scale=0.03)
        return S, 1 + randn(g, 2, scale=0.05), 0.5 + randn(g, 3, scale=0.03)

    def reference(S: Tensor, left: Tensor, right: Tensor) -> Tensor:
        # Equality constraints on the support.
        a, b = left * right.sum(), right * left.sum()
        plan = projection_transport(S, (a, b)).detach()
        fixed = torch.diag_embed((plan == 0).flatten().to(S.dtype))[(plan == 0).flatten()]
        sums = torch.cat(
            [torch.kron(torch.eye(2, dtype=S.dtype), S.new_ones(1, 3)), S.new_ones(1, 2).kron(torch.eye(3, dtype=S.dtype))[:2]]
        )
        rows = torch.cat([sums, fixed])
        values = torch.cat([a, b[:2], S.new_zeros(len(fixed))])
        x = S.flatten()
        return (x - rows.mT @ (torch.linalg.inv(rows @ rows.mT) @ (rows @ x - values))).reshape(2, 3)

    return Layer(
        "projection_transport",
        call,
        sample,
        reference=reference,
        failures=(
            _infeasible("negative", lambda S, left, right: (S, left, right - 0.7)),
            Failure("NaN", lambda S, left, right: (S * torch.nan, left, right), NotConvergedError, (Status.NUMERICAL_ERROR,)),
        ),
    )


def _isotonic() -> Layer:
    def sample(g: torch.Generator) -> Inputs:
        return torch.tensor([0.0, 2.0, 1.0, 3.0], dtype=torch.float64) + randn(g, 4, scale=0.1), 1 + 0.3 * randn(g, 4).tanh()

    def reference(x: Tensor, w: Tensor) -> Tensor:
        mean = (w[1:3] * x[1:3]).sum() / w[1:3].sum()
        return torch.stack([x[0], mean, mean, x[3]])

    return Layer("projection_isotonic", projection_isotonic, sample, reference=reference)


def _module() -> Layer:
    def module() -> Projection:
        return Projection("l2_ball", max_value=torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64)))

    projection = module()

    def call(x: Tensor) -> Tensor:
        return projection(x) if x.dtype == torch.float64 else copy.deepcopy(projection).to(x.dtype)(x)

    return Layer("Projection", call, _near(1.0, -0.5, 0.7), module=module, reference=lambda x: 0.8 * x / (x * x).sum().sqrt())


PROJECTIONS: tuple[Layer, ...] = (
    _second_order(),
    _psd(),
    _exponential(),
    _power(),
    _simplex(),
    _l1_ball(),
    _l2_ball(),
    _box(),
    _halfspace(),
    _box_section(),
    _affine_set(),
    _polyhedron(),
    _transport(),
    _isotonic(),
    _module(),
)
