"""Entropic transport beside POT: time and memory of a plan loss with its gradient, and how wrong the gradient is.

``python -m benchmarks.transport``, with ``--all`` for large point clouds. POT runs its log-domain method with the torch backend: unrolled
(autograd follows the sweeps) and with ``grad="last_step"``. The published implicit differentiation (Eisenberger et al. 2022) is
restated on the plan that POT ends with: the marginal equations, one of them dropped, solved by LU. The reference is Newton's method on all
the marginal equations in NumPy, started from our potentials, and the adjoint system at its end. Memory is the most that torch held at once.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Table, describe_machine, installed, one_thread, peak_memory, race
from difflayers.transport import sinkhorn

Gradient = Callable[[], Tensor]

# POT's marginal error, a looser one where its graph would not fit into memory, and its default for the most sweeps.
_POT_TOL, _POT_LOOSE, _POT_SWEEPS = 1e-6, 1e-4, 1000


def main(*, short: bool = False, everything: bool = False) -> None:
    """Print the tables."""
    one_thread()
    torch.set_default_dtype(torch.float64)
    describe_machine(["POT", "geomloss"])
    warnings.filterwarnings("ignore", message="Sinkhorn did not converge")
    columns = [("cost", 7), ("n", -5), ("ε", -6), ("ours ms", -8), ("unrolled ×", -10), ("last step ×", -11), ("implicit ×", -10)]
    columns += [(f"{name} {what}", -len(f"{name} {what}")) for what in ("err", "MB") for name in ("ours", "unr.", "last", "impl.")]
    table = Table("A plan loss, forward and backward; error of the gradient in the cost, relative to its largest entry", columns)
    sizes = [(50, 1e-2)] if short else [(50, 1e-2), (200, 1e-2), (200, 1e-3), (500, 1e-3), (1000, 1e-2)]
    for n, epsilon in sizes:
        # Points are the harder cost. The graph of large ones takes POT gigabytes and minutes.
        for kind in ("random", "points") if n <= 200 or everything else ("random",):
            _row(table, kind, n, epsilon, budget=0.5 if short else 4.0)
    _batches(short=short)


def _row(table: Table, kind: str, n: int, epsilon: float, budget: float) -> None:
    cost, weights = _problem(kind, n)

    def ours() -> Tensor:
        leaf = cost.clone().requires_grad_()
        return torch.autograd.grad((sinkhorn(leaf, epsilon=epsilon).plan * weights).sum(), leaf)[0]

    contestants: dict[str, Gradient] = {"ours": ours}
    if installed("POT"):
        contestants |= {name: _pot(cost, weights, epsilon, name) for name in ("unrolled", "last step", "implicit")}
    exact = exact_gradient(cost, weights, epsilon)
    errors = {name: float((run() - exact).abs().max() / exact.abs().max()) for name, run in contestants.items()}
    memory = {name: peak_memory(run) / 2**20 for name, run in contestants.items()}
    times = race(contestants, budget=budget, rounds=(1, 20))
    peers = ("unrolled", "last step", "implicit")
    ratios = [times.ratio(name, "ours") if name in contestants else None for name in peers]
    every = ("ours", *peers)
    table.row(kind, n, epsilon, 1e3 * times.seconds("ours"), *ratios, *(errors.get(k) for k in every), *(memory.get(k) for k in every))


def _problem(kind: str, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    weights = torch.randn(n, n, generator=generator)
    if kind == "random":
        return torch.rand(n, n, generator=generator), weights
    return torch.cdist(torch.rand(n, 2, generator=generator), torch.rand(n, 2, generator=generator)) ** 2, weights


def _pot(cost: Tensor, weights: Tensor, epsilon: float, how: str) -> Gradient:
    import ot

    n = cost.shape[-1]
    a, tol = torch.full((n,), 1 / n), _POT_TOL if n * n / epsilon < 2e8 else _POT_LOOSE

    def plan(leaf: Tensor) -> Tensor:
        if how == "last step":
            return ot.solve(leaf, a, a, reg=epsilon, reg_type="entropy", grad="last_step", tol=tol, max_iter=_POT_SWEEPS).plan
        return ot.sinkhorn(a, a, leaf, epsilon, method="sinkhorn_log", stopThr=tol, numItermax=_POT_SWEEPS)

    def gradient() -> Tensor:
        if how == "implicit":
            with torch.no_grad():
                return _implicit(plan(cost), weights, epsilon)
        leaf = cost.clone().requires_grad_()
        return torch.autograd.grad((plan(leaf) * weights).sum(), leaf)[0]

    return gradient


def _implicit(P: Tensor, weights: Tensor, epsilon: float) -> Tensor:
    n = P.shape[0]
    matrix = torch.cat([torch.cat([P.sum(-1).diag(), P], 1), torch.cat([P.mT, P.sum(-2).diag()], 1)])
    M = P * weights
    u = torch.cat([torch.linalg.solve(matrix[:-1, :-1], torch.cat([M.sum(-1), M.sum(-2)])[:-1]), P.new_zeros(1)])
    return -(M - P * (u[:n, None] + u[n:])) / epsilon


def exact_plan(cost: Tensor, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """The plan for uniform marginals, and the matrix of its marginal equations without the last: Newton's method from our potentials."""
    found = sinkhorn(cost, epsilon=epsilon)
    C, (n, m), x = cost.numpy(), cost.shape, torch.cat([found.f, found.g]).numpy()
    wanted = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])[:-1]
    for step in range(4):
        P = np.exp((x[:n, None] + x[n:] - C) / epsilon)
        matrix = np.block([[np.diag(P.sum(1)), P], [P.T, np.diag(P.sum(0))]])[:-1, :-1]
        if step < 3:
            # The plan of a cloud with itself may be disconnected up to rounding: the shift keeps the matrix regular.
            shifted = matrix + 1e-13 * np.diag(matrix.diagonal())
            x = x + epsilon * np.append(np.linalg.solve(shifted, wanted - np.concatenate([P.sum(1), P.sum(0)])[:-1]), 0)
    return P, matrix


def exact_gradient(cost: Tensor, weights: Tensor, epsilon: float) -> Tensor:
    """d ⟨plan, weights⟩ / d cost by the adjoint system, in NumPy."""
    P, matrix = exact_plan(cost, epsilon)
    M, n = P * weights.numpy(), len(P)
    rhs = np.concatenate([M.sum(1), M.sum(0)])[:-1]
    u = np.linalg.solve(matrix, rhs)
    u = np.append(u + np.linalg.solve(matrix, rhs - matrix @ u), 0)
    return torch.from_numpy(-(M - P * (u[:n, None] + u[n:])) / epsilon)


def _batches(*, short: bool) -> None:
    table = Table("64 problems of 50 × 50: one batch beside a loop", [("ε", 6), ("batch ms", -8), ("loop ×", -8), ("difference", -10)])
    generator = torch.Generator().manual_seed(0)
    cost, weights = torch.rand(64, 50, 50, generator=generator), torch.randn(50, 50, generator=generator)
    for epsilon in (1e-2,) if short else (1e-1, 1e-2, 1e-3):

        def gradient(part: Tensor, epsilon: float = epsilon) -> Tensor:
            leaf = part.clone().requires_grad_()
            return torch.autograd.grad((sinkhorn(leaf, epsilon=epsilon).plan * weights).sum(), leaf)[0]

        def loop(gradient: Callable[[Tensor], Tensor] = gradient) -> Tensor:
            return torch.stack([gradient(part) for part in cost])

        difference = float((gradient(cost) - loop()).abs().max() / gradient(cost).abs().max())
        times = race({"batch": lambda: gradient(cost), "loop": loop}, budget=0.5 if short else 3.0)
        table.row(epsilon, 1e3 * times.seconds("batch"), times.ratio("loop", "batch"), difference)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    parser.add_argument("--all", action="store_true", help="large point clouds too, some minutes more")
    options = parser.parse_args()
    main(short=options.short, everything=options.all)
