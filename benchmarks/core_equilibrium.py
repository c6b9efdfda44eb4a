"""Deep equilibrium models x = tanh(Wx + Uz + b) beside torchdeq and TorchOpt: evaluations, time and error of the gradient.

W is Gaussian of spectral radius 0.9, the batch is 16, and everybody is asked for the same relative tolerance. Work is counted in matrix
products of the batch with W, in units of one evaluation of the map (one Jacobian product is one, the gradient in W is
one), so that what hides in a Jacobian or in a second linearization counts. The reference iterates the fixed point and its adjoint in
float64 to 1e-14.

The second table asks what a slow element does to its batch. Each element has its own gain; one of them contracts a tenth as fast as
the others. An element's answer should not depend on its neighbours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Table, installed, race
from difflayers.implicit import implicit_fixed_point
from difflayers.solvers.linear import gmres

__all__ = ["equilibrium"]

_BATCH = 16
Model = Callable[..., Tensor]  # (x0, W, injection, gain) -> x


def cell(x: Tensor, W: Tensor, injection: Tensor, gain: Tensor) -> Tensor:
    """One evaluation; ``injection`` is Uz + b."""
    return torch.tanh(gain * (x @ W.mT) + injection)


def equilibrium(sizes: tuple[int, ...], budget: float) -> None:
    """Print the tables: each size as it is trained, in float32 to 1e-4, and the smallest in float64 to 1e-8."""
    columns = [
        ("model", 40),
        ("forward", -13),
        ("backward", -8),
        ("ms", -6),
        ("× the first", -11),
        ("x error", -7),
        ("gradient error", -14),
    ]
    for d, dtype, tol in [*((d, torch.float32, 1e-4) for d in sizes), (sizes[0], torch.float64, 1e-8)]:
        table = Table(f"Deep equilibrium, d = {d}, batch {_BATCH}, {dtype}, tolerance {tol:.0e}: evaluations, time, errors", columns)
        _compare(table, d, dtype, tol, budget)
    columns = [("model", 40), ("evaluations", -13), ("x moves by", -10), ("gradient moves by", -17)]
    table = Table("One slow element: how it moves its 15 neighbours (float64, tolerance 1e-8, d = 64)", columns)
    _slow_element(table, 1e-8)


def _models(tol: float) -> dict[str, Model | str]:
    models: dict[str, Model | str] = {}
    ours = functools.partial(implicit_fixed_point, cell, batch_ndim=1, tol=tol)
    krylov = functools.partial(gmres, tol=tol)
    models["ours, anderson + gmres"] = ours("anderson", linear_solver=krylov)
    models["ours, picard + gmres"] = ours("picard", linear_solver=krylov)
    models["ours, anderson + auto"] = ours("anderson")
    models |= _torchdeq(tol) if installed("torchdeq") else {"torchdeq": "not installed"}
    models |= _torchopt(tol) if installed("torchopt") else {"TorchOpt": "not installed"}
    return models


def _torchdeq(tol: float) -> dict[str, Model | str]:
    from torchdeq import get_deq

    models: dict[str, Model | str] = {}
    for solver in ("anderson", "fixed_point_iter"):
        options = {
            f"{side}_{key}": value
            for side in "fb"
            for key, value in (("solver", solver), ("max_iter", 1000), ("tol", tol), ("stop_mode", "rel"))
        }
        deq = get_deq(ift=True, **options)
        models[f"torchdeq, {solver}"] = lambda x0, *args, deq=deq: deq(lambda x: cell(x, *args), x0)[0][-1]
    return models


def _torchopt(tol: float) -> dict[str, Model | str]:
    import torchopt

    linear = torchopt.linear_solve.solve_normal_cg(rtol=tol)

    @torchopt.diff.implicit.custom_root(lambda x, *args: x - cell(x, *args), argnums=(1, 2, 3), solve=linear)
    def picard(x0: Tensor, W: Tensor, injection: Tensor, gain: Tensor) -> Tensor:
        return _picard(lambda x: cell(x, W, injection, gain), x0, tol)

    return {"TorchOpt, a Picard loop + normal_cg": picard}


def _picard(function: Callable[[Tensor], Tensor], x: Tensor, tol: float) -> Tensor:
    for _ in range(10_000):
        new = function(x)
        if (new - x).norm() <= tol * new.norm():
            return new
        x = new
    raise RuntimeError("the Picard iteration does not converge")


def _problem(d: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(d))
    W, injection = draw(d, d), 0.1 * draw(_BATCH, d)
    # The radius of a large Gaussian matrix is √d within a few percent; for a small one it has to be measured.
    W = 0.9 * W / (torch.linalg.eigvals(W).abs().max() if d <= 512 else math.sqrt(d))
    gain = torch.ones(_BATCH, 1)
    parameters = tuple(part.to(dtype).requires_grad_() for part in (W, injection, gain))
    return parameters, draw(_BATCH, d).to(dtype)


def _compare(table: Table, d: int, dtype: torch.dtype, tol: float, budget: float) -> None:
    parameters, cotangent = _problem(d, dtype)
    exact = _reference(parameters, cotangent)
    models = _models(tol)
    x0 = torch.zeros(_BATCH, d, dtype=dtype)

    def step(model: Model) -> list[Tensor]:
        x = model(x0, *parameters)
        return [x.detach(), *torch.autograd.grad(x, parameters, cotangent)]

    results: dict[str, Any] = {
        name: _attempt(functools.partial(step, model)) if callable(model) else model for name, model in models.items()
    }
    runs = {name: functools.partial(step, models[name]) for name, result in results.items() if not isinstance(result, str)}
    clock = race(runs, budget=budget)
    first = next(iter(runs))
    for name, result in results.items():
        if isinstance(result, str):
            table.row(name, result)
            continue
        forward, backward = _work(models[name], x0, parameters, cotangent)
        x_error, *errors = [float((new.double() - old).norm() / old.norm()) for new, old in zip(result, exact, strict=True)]
        table.row(name, forward, backward, 1e3 * clock.seconds(name), clock.ratio(name, first), x_error, max(errors))


def _attempt(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except Exception as error:  # whatever a contestant raises is its result
        return type(error).__name__


def _work(model: Model, x0: Tensor, parameters: tuple[Tensor, ...], cotangent: Tensor) -> tuple[int, int]:
    """Matrix products with W in forward and in backward, in evaluations of the map."""
    unit = 2 * x0.numel() * x0.shape[-1]
    with FlopCounterMode(display=False) as forward:
        x = model(x0, *parameters)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(x, parameters, cotangent)
    # Products with the one W are `mm`; what the solvers do with each element's own history is `bmm`, and shows in the time.
    counts = [counter.get_flop_counts()["Global"].get(torch.ops.aten.mm, 0) for counter in (forward, backward)]
    return round(counts[0] / unit), round(counts[1] / unit)


def _reference(parameters: tuple[Tensor, ...], cotangent: Tensor) -> list[Tensor]:
    W, injection, gain = (part.detach().double() for part in parameters)
    x = _picard(lambda x: cell(x, W, injection, gain), torch.zeros_like(injection), 1e-14)
    slope = 1 - x**2
    u = _picard(lambda u: cotangent.double() + ((gain * slope * u) @ W), torch.zeros_like(x), 1e-14)
    v = slope * u
    return [x, (gain * v).mT @ x, v, (v * (x @ W.mT)).sum(-1, keepdim=True)]


def _slow_element(table: Table, tol: float) -> None:
    d = 64
    (W, injection, _), cotangent = _problem(d, torch.float64)
    gain = torch.full((_BATCH, 1), 0.3)
    gain[0] = 1.08  # times the radius 0.9
    injection = injection.detach() * gain.lt(1)  # the slow element stays in the linear range of tanh
    injection[0] += 1e-3
    for name, model in _models(tol).items():
        if isinstance(model, str):
            table.row(name, model)
            continue
        found = [
            _attempt(functools.partial(_neighbours, model, W, injection[first:], gain[first:], cotangent[first:], 1 - first))
            for first in (0, 1)
        ]
        if any(isinstance(each, str) for each in found):
            table.row(name, next(each for each in found if isinstance(each, str)))
            continue
        (x, gradient, work), (x_alone, gradient_alone, _) = found
        table.row(
            name, work, float((x - x_alone).norm() / x_alone.norm()), float((gradient - gradient_alone).norm() / gradient_alone.norm())
        )


def _neighbours(model: Model, W: Tensor, injection: Tensor, gain: Tensor, cotangent: Tensor, skip: int) -> tuple[Tensor, Tensor, int]:
    """x and its gradient in the injection without the first ``skip`` elements, and the evaluations of forward and backward."""
    parameters = tuple(part.detach().requires_grad_() for part in (W, injection, gain))
    x0 = torch.zeros_like(injection)
    x = model(x0, *parameters)
    gradient = torch.autograd.grad(x, parameters, cotangent)[1]
    return x.detach()[skip:], gradient[skip:], sum(_work(model, x0, parameters, cotangent))
