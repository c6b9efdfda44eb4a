"""The implicit core beside TorchOpt and torchdeq: errors and times of derivatives, float64 unless said otherwise, one thread.

1. Hypergradient of ridge regression with 1000 features, each with its own weight θ: w(θ) minimizes ½‖Xw − y‖² + ½ Σ exp(θ_j) w_j².
   The closed form dθ = −exp(θ) ∘ w ∘ (XᵀX + diag exp θ)⁻¹ dw is the reference.
2. Deep equilibrium models (:mod:`benchmarks.core_equilibrium`).
3. Dense or matrix-free: where the backward pass through a factorization and through Krylov iterations cost the same, in
   unknowns n and in entries of the Jacobian, batch·n². The limit up to which "auto" factorizes is set by this table.
4. Overhead: one derivative of the scalar root x³ = a.

Run as ``python -m benchmarks.core``: ``--short`` for a smoke run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.core_equilibrium import equilibrium
from benchmarks.timing import Table, describe_machine, installed, one_thread, race
from difflayers.errors import DiffLayersError
from difflayers.implicit import conditions, custom_root, implicit_root
from difflayers.implicit.methods import DENSE_LIMIT

__all__ = ["main"]

Solve = Callable[[Tensor], Tensor]


def main(*, short: bool = False) -> None:
    """Print all the tables."""
    one_thread()
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")  # it calls functorch by its old name
    describe_machine(["torchopt", "torchdeq"])
    ridge(100 if short else 1000, 0.1 if short else 4.0)
    equilibrium((64,) if short else (512, 2048), 0.1 if short else 4.0)
    crossing((32, 64) if short else (32, 64, 128, 256, 512, 1024, 2048), 0.1 if short else 2.0)
    overhead(0.1 if short else 2.0)


def ridge(features: int, budget: float) -> None:
    """The first table."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    X, y = draw(2 * features, features) / math.sqrt(2 * features), draw(2 * features)
    theta = (0.5 * draw(features) - 2).requires_grad_()
    cotangent = draw(features)

    def objective(w: Tensor, theta: Tensor) -> Tensor:
        return ((X @ w - y) ** 2).sum() / 2 + (theta.exp() * w**2).sum() / 2

    def closed_form(theta: Tensor) -> Tensor:
        return torch.cholesky_solve((X.mT @ y)[:, None], torch.linalg.cholesky(X.mT @ X + theta.exp().diag()))[:, 0]

    stationary = conditions.stationarity(objective)
    layers: dict[str, Solve | str] = {"autograd through the Cholesky factor": closed_form}
    for solver in ("cg", "cholesky", "auto"):
        layer = custom_root(stationary, linear_solver=solver, symmetric=True)(lambda start, theta: closed_form(theta))
        layers[f"ours, {solver}"] = functools.partial(layer, None)
    layers |= _torchopt_ridge(stationary, closed_form)
    with torch.no_grad():
        w = closed_form(theta)
        exact = -theta.exp() * w * torch.linalg.solve(X.mT @ X + theta.exp().diag(), cotangent)

    forward: dict[str, Any] = {name: functools.partial(layer, theta) for name, layer in layers.items() if callable(layer)}
    backward = {name: (run, lambda w: torch.autograd.grad(w, theta, cotangent)) for name, run in forward.items()}
    there, back = race(forward, budget=budget), race(backward, budget=budget)
    columns = [("layer", 38), ("forward ms", -13), ("backward ms", -11), ("backward / forward", -18), ("gradient error", -14)]
    table = Table(f"Hypergradient of ridge regression, {features} features", columns)
    for name, layer in layers.items():
        if not callable(layer):
            table.row(name, layer)
            continue
        (found,) = torch.autograd.grad(layer(theta), theta, cotangent)
        error = float((found - exact).norm() / exact.norm())
        table.row(name, 1e3 * there.seconds(name), 1e3 * back.seconds(name), back.seconds(name) / there.seconds(name), error)


def _torchopt_ridge(stationary: Callable[..., Tensor], closed_form: Solve) -> dict[str, Solve | str]:
    if not installed("torchopt"):
        return {"TorchOpt": "not installed"}
    import torchopt

    solvers = {"normal_cg (its default)": None, "cg to 1e-12": torchopt.linear_solve.solve_cg(rtol=1e-12)}
    layers: dict[str, Solve | str] = {}
    for name, solver in solvers.items():

        @torchopt.diff.implicit.custom_root(stationary, argnums=1, solve=solver)
        def layer(start: Tensor, theta: Tensor) -> Tensor:
            return closed_form(theta)

        layers[f"TorchOpt, {name}"] = lambda theta, layer=layer: layer(torch.zeros_like(theta), theta)
    return layers


def crossing(sizes: tuple[int, ...], budget: float) -> None:
    """The third table: backward passes at a known solution, nothing else."""
    columns = [("problem", 44), ("batch", -5), *((f"n {n}", -7) for n in sizes), ("equal at n", -10), ("batch·n²", -8)]
    table = Table(f'Backward by Krylov iterations ÷ by a factorization ("auto" factorizes up to batch·n² = {DENSE_LIMIT:.0e})', columns)
    problems = {
        "contraction x = tanh(Wx + θ), gmres ÷ lu": (_contraction, "gmres", "lu", False),
        "Hx + x³ = θ, cond(H) = 100, cg ÷ cholesky": (functools.partial(_definite, 1e2), "cg", "cholesky", True),
        "Hx + x³ = θ, cond(H) = 1e4, cg ÷ cholesky": (functools.partial(_definite, 1e4), "cg", "cholesky", True),
    }
    for name, (make, krylov, dense, symmetric) in problems.items():
        for batch in (1, 16):
            # Beyond, one factorization takes many seconds, and the answer is known by then.
            ratios = [_ratio(make(n, batch), krylov, dense, symmetric, budget / len(sizes)) if batch * n**3 < 1e10 else None for n in sizes]
            n_equal = _equal(sizes, ratios)
            table.row(name, batch, *ratios, n_equal and round(n_equal), n_equal and f"{batch * n_equal**2:.1e}")


def _ratio(problem: tuple[Callable[..., Tensor], Tensor, Tensor], krylov: str, dense: str, symmetric: bool, budget: float) -> float | str:
    residual, x, theta = problem
    runs = {}
    for method in (krylov, dense):
        layer = implicit_root(residual, _known, linear_solver=method, symmetric=symmetric, batch_ndim=1)
        runs[method] = (functools.partial(layer, x, theta), lambda x: torch.autograd.grad(x.sum(), theta))
    try:
        return race(runs, budget=budget).ratio(krylov, dense)
    except DiffLayersError:  # ours fail in the open, too
        return "failed"


def _known(residual: Callable[..., Tensor], x0: Tensor, *, batch_ndim: int) -> Tensor:
    """The solver of a problem that starts at its solution."""
    return x0


def _contraction(n: int, batch: int) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(n))
    W, x = 0.9 * draw(n, n) / math.sqrt(n), 0.2 * draw(batch, n).clamp(-4, 4)
    theta = torch.atanh(x) - x @ W.mT
    return lambda x, theta: x - torch.tanh(x @ W.mT + theta), x, theta.requires_grad_()


def _definite(condition: float, n: int, batch: int) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(n))
    basis, x = torch.linalg.qr(draw(n, n)).Q, 0.2 * draw(batch, n)
    H = (basis * torch.logspace(0, math.log10(condition), n)) @ basis.mT
    return lambda x, theta: x @ H + x**3 - theta, x, (x @ H + x**3).requires_grad_()


def _equal(sizes: tuple[int, ...], ratios: list[float | str | None]) -> float | None:
    """Where the ratio passes 1 from above, by interpolation of logarithms; None if it does not."""
    known = [(n, ratio) for n, ratio in zip(sizes, ratios, strict=True) if isinstance(ratio, float)]
    for (n, before), (larger, after) in itertools.pairwise(known):
        if before > 1 >= after:
            return n * (larger / n) ** (math.log(before) / math.log(before / after))
    return None


def overhead(budget: float) -> None:
    """The fourth table."""
    a = torch.tensor(8.0, requires_grad=True)
    cube = implicit_root(lambda x, a: x**3 - a)
    wrapped = custom_root(lambda x, a: x**3 - a)(lambda start, a: a ** (1 / 3))
    layers: dict[str, Solve] = {
        "autograd of a ** (1/3)": lambda a: a ** (1 / 3),
        "ours, implicit_root (Newton from 1)": lambda a: cube(torch.ones_like(a), a),
        "ours, custom_root": lambda a: wrapped(None, a),
    }
    if installed("torchopt"):
        import torchopt

        @torchopt.diff.implicit.custom_root(lambda x, a: x**3 - a, argnums=1)
        def peer(start: Tensor, a: Tensor) -> Tensor:
            return a ** (1 / 3)

        layers["TorchOpt, custom_root"] = lambda a: peer(torch.ones_like(a), a)
    forward = {name: functools.partial(layer, a) for name, layer in layers.items()}
    backward = {name: (run, lambda x: torch.autograd.grad(x, a)) for name, run in forward.items()}
    there, back = race(forward, budget=budget / 2), race(backward, budget=budget / 2)
    table = Table("Overhead: the scalar root x³ = a", [("layer", 38), ("forward µs", -13), ("backward µs", -11), ("gradient error", -14)])
    for name, layer in layers.items():
        (slope,) = torch.autograd.grad(layer(a), a)
        table.row(name, 1e6 * there.seconds(name), 1e6 * back.seconds(name), abs(float(slope) * 12 - 1))
    if not installed("torchopt"):
        table.row("TorchOpt, custom_root", "not installed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
