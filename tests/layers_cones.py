"""Conic programs and a CVXPY problem as entries of the registry of layers: each strictly complementary, with a curved cone active."""

from __future__ import annotations

import functools
from collections.abc import Callable

import cvxpy as cp
import torch
from torch import Tensor, nn

from difflayers.convex import Cones, CvxpyLayer, solve_cone
from difflayers.errors import InfeasibleError, NotConvergedError, UnboundedError
from difflayers.solution import Status
from tests.layers import Failure, Inputs, Layer, randn
from tests.reference import newton_root

__all__ = ["CONES"]


def _tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _near(*parts: Tensor) -> Callable[[torch.Generator], Inputs]:
    return lambda g: tuple(part + randn(g, *part.shape, scale=0.03) for part in parts)


def _nan_in_q(P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Inputs:
    return P, torch.full_like(q, torch.nan), A, b


def _infeasible(P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Inputs:
    return P, q, torch.zeros_like(A), -torch.ones_like(b)


def _unbounded(P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Inputs:
    # Nothing holds back the last unknown.
    free = torch.ones_like(q)
    free[..., -1] = 0
    return P * free * free.unsqueeze(-1), q - 3 * (1 - free), A * free, b


def _cone(name: str, cones: Cones, slack: Callable[[Tensor], Tensor], P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Layer:
    """x and y of a program whose projection is ``slack`` near the solution."""

    def call(*inputs: Tensor, **options: str) -> Tensor:
        return torch.cat(solve_cone(*inputs, cones, **options)[:2], -1)

    def reference(P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        def residual(z: Tensor, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
            x, v = z[: len(q)], z[len(q) :]
            s = slack(v)
            return torch.cat([(P + P.mT) @ x / 2 + q + A.mT @ (s - v), A @ x + s - b])

        found = solve_cone(P, q, A, b, cones)
        z = newton_root(residual, torch.cat([found.x, found.s - found.y]).detach(), P, q, A, b, steps=2)
        x, v = z[: len(q)], z[len(q) :]
        return torch.cat([x, slack(v) - v])

    return Layer(
        f"solve_cone, {name}",
        call,
        _near(P, q, A, b),
        reference=reference,
        failures=(
            Failure("infeasible", _infeasible, InfeasibleError, (Status.PRIMAL_INFEASIBLE,)),
            Failure("unbounded", _unbounded, UnboundedError, (Status.DUAL_INFEASIBLE,)),
            Failure("NaN", _nan_in_q, NotConvergedError, (Status.NUMERICAL_ERROR,)),
        ),
        heavy=True,
    )


def _second_order() -> Layer:
    # x₁ ≤ 0.3 and ‖x − (1, 0)‖ ≤ 1 are active, x₂ ≤ 9 is not.
    def slack(v: Tensor) -> Tensor:
        t, u = v[2], v[3:]
        radius = (u * u).sum().sqrt()
        return torch.cat([0 * v[:1], v[1:2], (t + radius) / 2 * torch.cat([torch.ones_like(v[:1]), u / radius])])

    A = _tensor([1.0, 0.1], [0.0, 1.0], [0.0, 0.0], [-1.0, 0.0], [0.0, -1.0])
    b = _tensor(0.3, 9.0, 1.0, -1.0, 0.0)
    return _cone("second order", Cones(nonneg=2, soc=(3,)), slack, torch.eye(2, dtype=torch.float64), _tensor(-1.5, -2.5), A, b)


def _semidefinite() -> Layer:
    # The matrix of b − A x has rank one at the solution.
    def slack(v: Tensor) -> Tensor:
        half = 0.5**0.5
        V = torch.stack([v[0], half * v[1], half * v[1], v[2]]).reshape(2, 2)
        squared = V @ V
        root = -torch.linalg.det(V)  # the eigenvalues have opposite signs
        absolute = (squared + root * torch.eye(2, dtype=v.dtype)) / (squared.trace() + 2 * root).sqrt()
        positive = (V + absolute) / 2
        return torch.stack([positive[0, 0], positive[0, 1] / half, positive[1, 1]])

    A, b = _tensor([-1.0, 0.2], [0.1, -1.4], [-0.3, 0.4]), _tensor(1.0, 0.2, 1.0)
    return _cone("semidefinite", Cones(psd=(2,)), slack, torch.eye(2, dtype=torch.float64), _tensor(0.5, -2.0), A, b)


def _three_dimensional(name: str, cones: Cones, boundary: Callable[[Tensor], Tensor], b: Tensor) -> Layer:
    """The reference is the stationarity of the Lagrangian, with ``boundary(s) = 0`` as an equation."""

    def call(*inputs: Tensor, **options: str) -> Tensor:
        return torch.cat(solve_cone(*inputs, cones, **options)[:2], -1)

    def reference(P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        def residual(z: Tensor, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
            x, s, y, multiplier = z.split([2, 3, 3, 1])
            normal = torch.func.grad(boundary)(s)
            return torch.cat([(P + P.mT) @ x / 2 + q + A.mT @ y, A @ x + s - b, y + multiplier * normal, boundary(s).reshape(1)])

        found = solve_cone(P, q, A, b, cones)
        normal = torch.func.grad(boundary)(found.s.detach())
        multiplier = -(normal @ found.y) / (normal @ normal)
        start = torch.cat([found.x, found.s, found.y, multiplier.reshape(1)]).detach()
        x, _, y, _ = newton_root(residual, start, P, q, A, b, steps=3).split([2, 3, 3, 1])
        return torch.cat([x, y])

    A = _tensor([-1.0, 0.1], [0.2, 0.3], [0.1, -1.0])
    return Layer(
        f"solve_cone, {name}",
        call,
        _near(torch.eye(2, dtype=torch.float64), _tensor(-1.0, 1.0), A, b),
        reference=reference,
        failures=(Failure("NaN", _nan_in_q, NotConvergedError, (Status.NUMERICAL_ERROR,)),),
        heavy=True,
    )


def _exponential() -> Layer:
    return _three_dimensional("exponential", Cones(exp=1), lambda s: s[1] * torch.exp(s[0] / s[1]) - s[2], _tensor(0.2, 1.0, 0.5))


def _power() -> Layer:
    return _three_dimensional("power", Cones(pow=(0.3,)), lambda s: s[2] - s[0] ** 0.3 * s[1] ** 0.7, _tensor(0.5, 1.0, 3.0))


class _First(nn.Module):
    """A layer whose tuple has one tensor."""

    def __init__(self, layer: CvxpyLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*inputs)[0]


@functools.cache
def _markowitz() -> CvxpyLayer:
    """The return of three assets at a bounded risk; what is not invested earns nothing."""
    returns, loadings, risk = cp.Parameter(3), cp.Parameter((2, 3)), cp.Parameter()
    w = cp.Variable(3)
    constraints = [cp.norm(cp.hstack([loadings @ w, 0.3 * w])) <= risk, cp.sum(w) <= 1.5, w >= -0.6]
    return CvxpyLayer(cp.Problem(cp.Maximize(returns @ w), constraints), [returns, loadings, risk], [w])


def _portfolio() -> Layer:
    def call(*inputs: Tensor, **options: str) -> Tensor:
        return _markowitz().solve(*inputs, **options).values[0]

    def infeasible(returns: Tensor, loadings: Tensor, risk: Tensor) -> Inputs:
        return returns, loadings, -torch.ones_like(risk)

    return Layer(
        "CvxpyLayer, portfolio",
        call,
        _near(_tensor(1.0, 0.5, 0.3), _tensor([0.5, 0.1, 0.3], [-0.2, 0.6, 0.1]), torch.tensor(0.5, dtype=torch.float64)),
        leading=False,
        failures=(
            Failure("infeasible", infeasible, InfeasibleError, (Status.PRIMAL_INFEASIBLE,)),
            Failure("NaN", lambda a, b, c: (a * torch.nan, b, c), NotConvergedError, (Status.NUMERICAL_ERROR,)),
        ),
        module=lambda: _First(_markowitz()),
        heavy=True,
    )


CONES: tuple[Layer, ...] = (_second_order(), _semidefinite(), _exponential(), _portfolio())
