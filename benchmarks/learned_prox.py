"""Learned proximal networks: the pass through the gradient of a convex network, and its inversion, beside the published ways.

1. f = ∇ψ + μ·, forward, and backward of a loss of it into all parameters. Ours writes the gradient out as one pass through the
   transposed layers; the published way, and that of most input convex networks, is ``autograd.grad`` of the potential with
   ``create_graph=True``; ``torch.func.grad`` is the third. Float32, widths like the published ones; the error is against ours in float64.
2. Inversion: f(y) = x for 64 points at once, and with it the prior. Ours is Newton's method with conjugate gradients on the whole batch.
   The published way takes one point after the other and minimizes ψ(y) + μ/2 ‖y‖² − ⟨x, y⟩ by a method of first order: Adam, and scipy's
   L-BFGS-B and conjugate gradients. Float64; times beside ‖f(y) − x‖ / ‖x‖, the worst of the points. Adam takes as many steps as it is
   given; 300 here; it would need many more for the accuracy of the others.

Run as ``python -m benchmarks.learned_prox``; ``--short`` for a smoke run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from benchmarks.timing import Table, describe_machine, one_thread, peak_memory, race
from difflayers.prox import ConvolutionalInputConvexNN, InputConvexNN, LearnedProximalNetwork

__all__ = ["main"]

Pass = Callable[[LearnedProximalNetwork, Tensor], Tensor]


def main(*, short: bool = False) -> None:
    """Print all the tables."""
    one_thread()
    describe_machine(["scipy"])
    torch.manual_seed(0)
    steps(short)
    inversions(short)


def explicit(network: LearnedProximalNetwork, y: Tensor) -> Tensor:
    """Ours."""
    return network(y)


def by_autograd(network: LearnedProximalNetwork, y: Tensor) -> Tensor:
    """The published way, less its ``requires_grad_`` on the caller's tensor."""
    y = y.detach().requires_grad_()
    return torch.autograd.grad(network.potential(y).sum(), y, create_graph=True)[0]


def by_func(network: LearnedProximalNetwork, y: Tensor) -> Tensor:
    """The same by torch.func."""
    return torch.func.grad(lambda y: network.potential(y).sum())(y)


WAYS: dict[str, Pass] = {"ours": explicit, "autograd.grad": by_autograd, "func.grad": by_func}


def steps(short: bool) -> None:
    """One training step, less the optimizer."""
    columns = [("network", 34), ("ours ms", -7), ("MB", -6), ("error", -6)]
    for name in [*WAYS][1:]:
        columns += [(f"{name} ×", -15), ("MB", -6), ("error", -6)]
    table = Table("A learned proximal network, forward and backward", columns)
    cases: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        ("dense 64, 2 × 256, batch 128", InputConvexNN(64, 256, 2), (128, 64)),
        ("dense 784, 3 × 256, batch 128", InputConvexNN(784, 256, 3), (128, 784)),
        ("conv 28², 64 ch., strides 1212, 16", ConvolutionalInputConvexNN(1, 64, (1, 2, 1, 2)), (16, 1, 28, 28)),
        ("conv 64², 32 ch., 7 × 7, batch 8", ConvolutionalInputConvexNN(1, 32, (1,), 7), (8, 1, 64, 64)),
    ]
    for label, potential, shape in cases[: 1 if short else None]:
        network, y, x = LearnedProximalNetwork(potential), torch.rand(shape), torch.rand(shape)
        exact = gradients(explicit, copy.deepcopy(network).double(), y.double(), x.double())
        runs = {name: functools.partial(gradients, way, network, y, x) for name, way in WAYS.items()}
        clock = race(runs, budget=0.1 if short else 4.0)
        cells: list[object] = [label]
        for name, run in runs.items():
            cells.append(1e3 * clock.seconds("ours") if name == "ours" else clock.ratio(name, "ours"))
            cells += [peak_memory(run) / 2**20, float((run().double() - exact).norm() / exact.norm())]
        table.row(*cells)


def gradients(way: Pass, network: LearnedProximalNetwork, y: Tensor, x: Tensor) -> Tensor:
    """The gradient of the squared error in all parameters, in a row."""
    loss = (way(network, y) - x).square().sum()
    found = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


def newton(network: LearnedProximalNetwork, x: Tensor) -> Tensor:
    """Ours: all points at once."""
    with torch.no_grad():
        return network.inverse(x)


def adam(network: LearnedProximalNetwork, x: Tensor, steps: int) -> Tensor:
    """The published way: one point at a time, so many steps of Adam."""
    found = []
    for point in x:
        y = point.clone().requires_grad_()
        optimizer = torch.optim.Adam([y], lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            y.grad = torch.autograd.grad(network.potential(y) - point @ y, y)[0]
            optimizer.step()
        found.append(y.detach())
    return torch.stack(found)


def by_scipy(network: LearnedProximalNetwork, x: Tensor, method: str) -> Tensor:
    """One point at a time by scipy, to the accuracy that it reaches."""

    def objective(point: Tensor, y: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.from_numpy(y)
        with torch.no_grad():
            return float(network.potential(at) - point @ at), (network(at) - point).numpy()

    options = {"maxiter": 5000} | ({"maxfun": 10_000, "ftol": 0.0, "gtol": 1e-10} if method == "L-BFGS-B" else {"gtol": 1e-10})
    solved = [minimize(functools.partial(objective, point), point.numpy(), jac=True, method=method, options=options).x for point in x]
    return torch.from_numpy(np.stack(solved))


def inversions(short: bool) -> None:
    """64 points at once against one after the other."""
    count = 4 if short else 64
    ways: dict[str, Callable[[LearnedProximalNetwork, Tensor], Tensor]] = {
        "ours": newton,
        "Adam": functools.partial(adam, steps=50 if short else 300),
        "L-BFGS-B": functools.partial(by_scipy, method="L-BFGS-B"),
        "CG": functools.partial(by_scipy, method="CG"),
    }
    columns = [("network", 24), ("ours s", -7), ("residual", -8)]
    for name in [*ways][1:]:
        columns += [(f"{name} ×", -len(name) - 2), ("residual", -8)]
    table = Table(f"Inversion of {count} points", columns)
    for n, modulus in ((2, 0.1), (64, 0.1)):
        network = LearnedProximalNetwork(InputConvexNN(n, 64, 2), modulus).double()
        with torch.no_grad():
            x = network(torch.rand(count, n, dtype=torch.float64))
        newton(network, x[:1])  # the first call of all pays for imports
        cells: list[object] = [f"{n}, 2 × 64, μ = {modulus}"]
        ours = 0.0
        for name, way in ways.items():
            begin = time.process_time()  # once: a run takes seconds
            y = way(network, x)
            seconds = time.process_time() - begin
            ours = ours or seconds
            with torch.no_grad():
                residual = (network(y) - x).norm(dim=-1) / x.norm(dim=-1)
            cells += [seconds if name == "ours" else seconds / ours, float(residual.max())]
        table.row(*cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
