"""The registry of layers that must pass the contract: a new layer is one entry of ``LAYERS``.

An entry is a function of tensors, how to draw a small instance of its inputs, and, where it has them, its batched form, a
reference, the failures that it can have, its module and a version with a given number of iterations. Small means two or
three unknowns: every check of :mod:`tests.contract` runs on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.func import grad

from difflayers.convex import QPLayer, solve_qp
from difflayers.errors import InfeasibleError, NotConvergedError, SingularError, SolveError, UnboundedError
from difflayers.implicit import conditions, custom_fixed_point, custom_root, implicit_fixed_point, implicit_root, linear_solve
from difflayers.solution import Status
from tests.reference import newton_root

__all__ = ["LAYERS", "Failure", "Function", "Inputs", "Layer", "randn"]

Inputs = tuple[Tensor, ...]
Function = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Failure:
    """A way in which one problem has no solution.

    Args:
        name: what is wrong with it.
        spoil: the inputs of a good problem -> those of a bad one.
        error: what ``on_failure="raise"`` raises.
        statuses: the statuses that may be reported.
    """

    name: str
    spoil: Callable[..., Inputs]
    error: type[SolveError]
    statuses: tuple[Status, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer with small instances.

    Args:
        name: unique.
        call: ``(*inputs, **options) -> tensor`` for one problem. If ``failures`` are given it takes ``on_failure``.
        sample: draws the float64 inputs of one problem, which is solvable and away from every kink.
        leading: ``call`` takes leading batch dimensions on any of its inputs, and those without are shared.
        reference: the same by other means, differentiable by autograd to second order.
        failures: the ways to fail.
        module: makes the nn.Module form, ``module(*inputs)``.
        limited: ``iterations -> call`` with that many iterations of its solver.
        tolerance: the relative error granted to derivatives.
        heavy: a call takes so long that the checks with deep nests of transforms run in the slow suite only.
    """

    name: str
    call: Function
    sample: Callable[[torch.Generator], Inputs]
    leading: bool = True
    reference: Function | None = None
    failures: tuple[Failure, ...] = ()
    module: Callable[[], nn.Module] | None = None
    limited: Callable[[int], Function] | None = None
    tolerance: float = 1e-8
    heavy: bool = False

    def inputs(self, seed: int = 0) -> Inputs:
        """One problem."""
        return self.sample(torch.Generator().manual_seed(seed))

    def batch(self, *shape: int) -> Inputs:
        """Problems along leading dimensions."""
        count = int(np.prod(shape))
        stacked = zip(*(self.inputs(seed) for seed in range(count)), strict=True)
        return tuple(torch.stack(parts).reshape(*shape, *parts[0].shape) for parts in stacked)


def randn(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _lead(*pairs: tuple[Tensor, int]) -> tuple[int, ...]:
    """The batch shape of tensors, each with its number of dimensions without a batch."""
    return tuple(torch.broadcast_shapes(*(tensor.shape[: tensor.dim() - ndim] for tensor, ndim in pairs)))


def _nan_in(position: int) -> Callable[..., Inputs]:
    return lambda *inputs: tuple(torch.full_like(part, torch.nan) if i == position else part for i, part in enumerate(inputs))


_LOST = (Status.MAX_ITER, Status.NUMERICAL_ERROR, Status.SINGULAR)


def _square_root() -> Layer:
    def call(a: Tensor, b: Tensor, **options: str) -> Tensor:
        lead = _lead((a, 0), (b, 0))
        return implicit_root(lambda x, a, b: x * x + b * x - a, batch_ndim=len(lead), **options)(a.new_ones(lead), a, b)

    return Layer(
        "implicit_root, scalar",
        call,
        lambda g: (2 + randn(g, scale=0.3), randn(g, scale=0.3)),
        reference=lambda a, b: (torch.sqrt(b * b + 4 * a) - b) / 2,
        failures=(
            Failure("no real root", lambda a, b: (a - 9, b), NotConvergedError, _LOST),
            Failure("NaN", _nan_in(0), NotConvergedError, (Status.NUMERICAL_ERROR,)),
        ),
    )


def _network(x: Tensor, weight: Tensor, bias: Tensor, signal: Tensor) -> Tensor:
    return x - 0.5 * torch.tanh(_times(weight, x) + bias) - torch.sin(signal)


def _network_inputs(generator: torch.Generator) -> Inputs:
    return randn(generator, 2, 2, scale=0.6), randn(generator, 2, scale=0.5), randn(generator, 2)


def _network_reference(weight: Tensor, bias: Tensor, signal: Tensor) -> Tensor:
    return newton_root(_network, torch.zeros_like(signal), weight, bias, signal)


def _vector() -> Layer:
    # The weight is closed over, bias and signal are arguments.
    def call(weight: Tensor, bias: Tensor, signal: Tensor, **options: str) -> Tensor:
        lead = _lead((weight, 2), (bias, 1), (signal, 1))

        def residual(x: Tensor, bias: Tensor, signal: Tensor) -> Tensor:
            return _network(x, weight, bias, signal)

        return implicit_root(residual, batch_ndim=len(lead), **options)(signal.new_zeros(*lead, 2), bias, signal)

    failure = Failure("NaN", _nan_in(2), NotConvergedError, (Status.NUMERICAL_ERROR,))
    return Layer("implicit_root, closure", call, _network_inputs, reference=_network_reference, failures=(failure,))


def _tree() -> Layer:
    def residual(x: dict[str, Tensor], target: Tensor, gain: Tensor) -> dict[str, Tensor]:
        level = x["level"] + 0.3 * torch.tanh(x["slope"]).sum() * gain - target[0]
        return {"level": level, "slope": x["slope"] + 0.2 * x["level"] - target[x["which"]] * torch.cos(x["slope"]), "which": x["which"]}

    def call(target: Tensor, gain: Tensor, **options: str) -> Tensor:
        start = {"level": target.new_zeros(()), "slope": target.new_zeros(2), "which": torch.tensor([1, 0], device=target.device)}
        found = implicit_root(residual, **options)(start, target, gain)
        return torch.cat([found["level"].reshape(1), found["slope"]])

    def reference(target: Tensor, gain: Tensor) -> Tensor:
        def flat(x: Tensor, target: Tensor, gain: Tensor) -> Tensor:
            parts = residual({"level": x[0], "slope": x[1:], "which": torch.tensor([1, 0])}, target, gain)
            return torch.cat([parts["level"].reshape(1), parts["slope"]])

        return newton_root(flat, target.new_zeros(3), target, gain)

    return Layer(
        "implicit_root, pytree",
        call,
        lambda g: (randn(g, 2, scale=0.5), randn(g, scale=0.5)),
        leading=False,
        reference=reference,
        failures=(Failure("NaN", _nan_in(0), NotConvergedError, (Status.NUMERICAL_ERROR,)),),
    )


def _slow_step(x: Tensor, a: Tensor) -> Tensor:
    # It contracts by about 0.999 a step, so that hundreds of steps are taken.
    return x + 1e-3 * (torch.sin(a) - x - 0.1 * x**3)


def _fixed_point(solver: str) -> Layer:
    def step(x: Tensor, bias: Tensor, signal: Tensor, weight: Tensor) -> Tensor:
        return 0.5 * torch.tanh(_times(weight, x) + bias) + torch.sin(signal)

    def call(weight: Tensor, bias: Tensor, signal: Tensor, **options: str) -> Tensor:
        lead = _lead((weight, 2), (bias, 1), (signal, 1))
        solve = implicit_fixed_point(step, solver, batch_ndim=len(lead), **options)
        return solve(signal.new_zeros(*lead, 2), bias, signal, weight)

    def limited(iterations: int) -> Function:
        solve = implicit_fixed_point(_slow_step, solver, tol=0.0, max_iter=iterations, on_failure="warn")
        return lambda weight, bias, signal: solve(torch.zeros_like(signal), signal)

    return Layer(
        f"implicit_fixed_point, {solver}",
        call,
        _network_inputs,
        reference=_network_reference,
        failures=(Failure("NaN", _nan_in(2), NotConvergedError, (Status.NUMERICAL_ERROR,)),),
        limited=limited,
    )


def _expanding() -> Layer:
    # T(x) = w x + a has a fixed point for every w ≠ 1, which Picard's iteration finds for |w| < 1 only.
    def call(weight: Tensor, signal: Tensor, **options: str) -> Tensor:
        lead = _lead((weight, 1), (signal, 1))
        solve = implicit_fixed_point(lambda x: weight * x + signal, "picard", batch_ndim=len(lead), **options)
        return solve(signal.new_zeros(*lead, 2))

    return Layer(
        "implicit_fixed_point, linear",
        call,
        lambda g: (0.5 + randn(g, 2, scale=0.1), randn(g, 2)),
        reference=lambda weight, signal: signal / (1 - weight),
        failures=(Failure("expanding", lambda w, a: (w + 1.5, a), NotConvergedError, _LOST),),
    )


def _scipy() -> Layer:
    @custom_root(_network)
    def solve(x0: None, weight: Tensor, bias: Tensor, signal: Tensor) -> Tensor:
        w, c, s = (part.numpy().astype(np.float64) for part in (weight, bias, signal))
        found = scipy.optimize.root(lambda x: x - 0.5 * np.tanh(w @ x + c) - np.sin(s), np.zeros(2), tol=1e-15)
        return torch.as_tensor(found.x, dtype=signal.dtype)

    def call(weight: Tensor, bias: Tensor, signal: Tensor) -> Tensor:
        return solve(None, weight, bias, signal)

    return Layer("custom_root, scipy", call, _network_inputs, leading=False, reference=_network_reference)


def _loop() -> Layer:
    def step(x: Tensor, signal: Tensor) -> Tensor:
        return 0.5 * torch.cos(x) * signal

    def solver(iterations: int) -> Function:
        @custom_fixed_point(step)
        def solve(x0: Tensor, signal: Tensor) -> Tensor:
            for _ in range(iterations):
                x0 = step(x0, signal)
            return x0

        return lambda signal: solve(torch.zeros_like(signal), signal)

    def reference(signal: Tensor) -> Tensor:
        return newton_root(lambda x, signal: x - step(x, signal), torch.zeros_like(signal), signal)

    return Layer("custom_fixed_point", solver(60), lambda g: (randn(g, 2),), leading=False, reference=reference, limited=solver)


def _general(generator: torch.Generator) -> Inputs:
    return torch.eye(3, dtype=torch.float64) + randn(generator, 3, 3, scale=0.12), randn(generator, 3)


def _definite(generator: torch.Generator) -> Inputs:
    A, b = _general(generator)
    return A @ A.mT, b


def _singular(A: Tensor, b: Tensor) -> Inputs:
    # Rank two, and b is not in the range.
    projection = torch.eye(3, dtype=A.dtype) - torch.ones(3, 3, dtype=A.dtype) / 3
    return projection.to(A), b + 1


_SINGULAR = Failure("singular", _singular, SingularError, (Status.SINGULAR,))
_NAN_MATRIX = Failure("NaN", _nan_in(0), NotConvergedError, (Status.NUMERICAL_ERROR,))


def _linear(method: str) -> Layer:
    symmetric = method in ("cholesky", "cg")

    def call(A: Tensor, b: Tensor, **options: str) -> Tensor:
        if symmetric:
            A = (A + A.mT) / 2
        return linear_solve(A, b, method=method, **options).x

    def limited(iterations: int) -> Function:
        return lambda A, b: linear_solve(A, b, method=method, tol=0.0, max_iter=iterations, on_failure="warn").x

    def reference(A: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.inv((A + A.mT) / 2 if symmetric else A) @ b

    # A Neumann series that diverges cannot tell why.
    singular = Failure("expanding", lambda A, b: (4 * A, b), NotConvergedError, _LOST) if method == "neumann" else _SINGULAR
    return Layer(
        f"linear_solve, {method}",
        call,
        _definite if symmetric else _general,
        reference=reference,
        failures=(singular, _NAN_MATRIX),
        limited=limited if method == "neumann" else None,
    )


def _linear_function(method: str) -> Layer:
    # The matrix is closed over by the product.
    def call(A: Tensor, b: Tensor, **options: str) -> Tensor:
        lead = _lead((A, 2), (b, 1))
        return linear_solve(lambda u: _times(A, u), b.expand(*lead, 3), method=method, batch_ndim=len(lead), **options).x

    return Layer(
        f"linear_solve, function, {method}",
        call,
        _general,
        reference=lambda A, b: torch.linalg.inv(A) @ b,
        failures=(_SINGULAR, _NAN_MATRIX),
    )


def _stationarity() -> Layer:
    def objective(x: Tensor, curvature: Tensor, target: Tensor) -> Tensor:
        return torch.cosh(x).sum() + (_times(curvature, x) ** 2).sum() / 2 - (x * target).sum()

    root = implicit_root(conditions.stationarity(objective), symmetric=True)

    def call(curvature: Tensor, target: Tensor) -> Tensor:
        return root(torch.zeros_like(target), curvature, target)

    def reference(curvature: Tensor, target: Tensor) -> Tensor:
        return newton_root(grad(objective), torch.zeros_like(target), curvature, target)

    return Layer("conditions.stationarity", call, lambda g: (randn(g, 2, 2), randn(g, 2)), leading=False, reference=reference, heavy=True)


def _kkt() -> Layer:
    # min Σ exp(xᵢ) − cᵀx subject to Σ xᵢ = d and x₀ ≤ u, which is active.
    residual = conditions.kkt(
        lambda x, c, d, u: (x.exp() - c * x).sum(),
        equality=lambda x, c, d, u: x.sum(-1, keepdim=True) - d,
        inequality=lambda x, c, d, u: x[:1] - u,
    )

    def call(c: Tensor, d: Tensor, u: Tensor) -> Tensor:
        return torch.cat(implicit_root(residual)((torch.zeros_like(c), c.new_zeros(1), c.new_zeros(1)), c, d, u))

    def reference(c: Tensor, d: Tensor, u: Tensor) -> Tensor:
        return newton_root(lambda s, *args: torch.cat(residual(s.split([3, 1, 1]), *args)), call(c, d, u).detach(), c, d, u, steps=1)

    def sample(g: torch.Generator) -> Inputs:
        c = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64) + randn(g, 3, scale=0.1)
        return c, randn(g, scale=0.1).abs(), 0.4 + randn(g, scale=0.05)

    return Layer("conditions.kkt", call, sample, leading=False, reference=reference, heavy=True)


def _proximal() -> Layer:
    # Two entries of the sparse solution are not zero, one is.
    def loss(x: Tensor, target: Tensor) -> Tensor:
        return (torch.cosh(x) - x * target).sum() + 0.1 * (x.sum() ** 2)

    def soft_threshold(x: Tensor, weight: Tensor, stepsize: float) -> Tensor:
        return x.sign() * (x.abs() - stepsize * weight).clamp(min=0)

    step = conditions.proximal_gradient(loss, soft_threshold, 0.3)
    solve = implicit_fixed_point(step)

    def call(weight: Tensor, target: Tensor) -> Tensor:
        return solve(torch.zeros_like(target), weight, target)

    def reference(weight: Tensor, target: Tensor) -> Tensor:
        return newton_root(lambda x, weight, target: x - step(x, weight, target), call(weight, target).detach(), weight, target, steps=1)

    def sample(g: torch.Generator) -> Inputs:
        return 0.8 + randn(g, scale=0.05), torch.tensor([2.5, -2.0, 0.2], dtype=torch.float64) + randn(g, 3, scale=0.1)

    return Layer("conditions.proximal_gradient", call, sample, leading=False, reference=reference, heavy=True)


class _Equilibrium(nn.Module):
    """z = tanh(W z + U x + b) with the parameters of the module closed over."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.injection = nn.Linear(2, 2, dtype=torch.float64), nn.Linear(2, 2, bias=False, dtype=torch.float64)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(randn(generator, *parameter.shape, scale=0.4))
        self.fixed_point = implicit_fixed_point(self.step)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        """The map whose fixed point is the output."""
        return torch.tanh(self.recurrent(z) + self.injection(x))

    def forward(self, x: Tensor) -> Tensor:
        """The fixed point ``(n,)``."""
        return self.fixed_point(torch.zeros_like(x), x)


def _equilibrium() -> Layer:
    module = _Equilibrium()

    def call(x: Tensor) -> Tensor:
        return (module if x.dtype == torch.float64 else copy.deepcopy(module).to(x.dtype))(x)

    def reference(x: Tensor) -> Tensor:
        return newton_root(lambda z, x: z - module.step(z, x), torch.zeros_like(x), x)

    return Layer("equilibrium module", call, lambda g: (randn(g, 2),), leading=False, reference=reference, module=_Equilibrium)


def _qp_inputs(generator: torch.Generator) -> Inputs:
    # At the solution one row of G and one bound are active, with multipliers away from zero.
    factor = torch.eye(3, dtype=torch.float64) + randn(generator, 3, 3, scale=0.1)
    q = torch.tensor([-4.0, 0.5, 4.0], dtype=torch.float64) + randn(generator, 3, scale=0.1)
    G = torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.0, 0.2]], dtype=torch.float64) + randn(generator, 2, 3, scale=0.05)
    h = torch.tensor([0.5, 4.0], dtype=torch.float64) + randn(generator, 2, scale=0.05)
    A = torch.tensor([[0.2, 1.0, 0.3]], dtype=torch.float64) + randn(generator, 1, 3, scale=0.05)
    b = randn(generator, 1, scale=0.2)
    return factor @ factor.mT, q, G, h, A, b, torch.full((3,), -1.5, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)


def _qp(name: str, **fixed: Any) -> Layer:
    mu = fixed.get("smoothing")

    def call(*inputs: Tensor, **options: str) -> Tensor:
        return torch.cat(solve_qp(*inputs, **fixed, **options)[:4], -1)

    def residual(s: Tensor, *inputs: Tensor) -> Tensor:
        P, q, G, h, A, b, lb, ub = inputs
        x, y, z, w = s.split([3, 1, 2, 3])
        gradient = (P + P.mT) @ x / 2 + q + A.mT @ y + G.mT @ z + w
        if mu is not None:
            return torch.cat([gradient, A @ x - b, z * (h - G @ x) - mu, w - mu / (ub - x) + mu / (x - lb)])
        box = torch.where(w > 0, x - ub, torch.where(w < 0, x - lb, w))
        return torch.cat([gradient, A @ x - b, torch.where(z > 0, G @ x - h, z), box])

    def reference(*inputs: Tensor) -> Tensor:
        return newton_root(residual, call(*inputs).detach(), *inputs, steps=1)

    def infeasible(P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor, lb: Tensor, ub: Tensor) -> Inputs:
        return P, q, G, torch.full_like(h, -20.0), A, b, lb, ub

    def unbounded(P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor, lb: Tensor, ub: Tensor) -> Inputs:
        # The objective falls along (0, 0, −1), which no constraint sees but the bounds that are taken off.
        free = torch.tensor([1.0, 1.0, 0.0], dtype=P.dtype)
        return P * torch.outer(free, free), q, G * free, h, A * free, b, torch.full_like(lb, -torch.inf), torch.full_like(ub, torch.inf)

    return Layer(
        name,
        call,
        _qp_inputs,
        reference=reference,
        failures=(
            Failure("infeasible", infeasible, InfeasibleError, (Status.PRIMAL_INFEASIBLE,)),
            Failure("unbounded", unbounded, UnboundedError, (Status.DUAL_INFEASIBLE,)),
            Failure("NaN", _nan_in(1), NotConvergedError, (Status.NUMERICAL_ERROR,)),
        ),
        module=(lambda: QPLayer(**fixed)) if fixed else QPLayer,
    )


LAYERS: tuple[Layer, ...] = (
    _square_root(),
    _vector(),
    _tree(),
    _fixed_point("anderson"),
    _fixed_point("picard"),
    _expanding(),
    _scipy(),
    _loop(),
    *(_linear(method) for method in ("lu", "cholesky", "cg", "normal_cg", "gmres", "bicgstab", "neumann")),
    _linear_function("lu"),
    _linear_function("gmres"),
    _stationarity(),
    _kkt(),
    _proximal(),
    _equilibrium(),
    _qp("solve_qp"),
    _qp("solve_qp, interior_point", solver="interior_point"),
    _qp("solve_qp, smoothing", smoothing=0.05),
)
