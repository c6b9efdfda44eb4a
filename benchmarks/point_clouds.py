"""Entropic transport between large point clouds: time, accuracy and memory of the value with its gradient in the points.

``python -m benchmarks.point_clouds``, with ``--all`` for 5,000 and 10,000 points (minutes). geomloss runs its Sinkhorn divergence with
``backend="tensorized"``, which holds the cost matrices; its "online" backend needs KeOps. It takes one sweep at each ε of a falling
sequence and does not look at the marginals. POT runs ``empirical_sinkhorn2(isLazy=True)`` in blocks of the same size; its value is ⟨P,
C⟩, and its gradient is the envelope's, from the lazy plan, taken here in blocks. All in float64. The error of a value and a gradient is
relative to ours at tol 1e-12, which the tests compare with the dense layer. Memory is the most that torch held at once (POT: NumPy's, by
tracemalloc).
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import Table, describe_machine, installed, one_thread, peak_memory
from difflayers.transport import sinkhorn, sinkhorn_divergence, sinkhorn_points

Gradient = Callable[[], tuple[Tensor, Tensor]]


def main(*, short: bool = False, everything: bool = False) -> None:
    """Print the tables."""
    one_thread()
    torch.set_default_dtype(torch.float64)
    describe_machine(["geomloss", "POT"])
    sizes = [500] if short else [1000, 2000, *([5000, 10_000] if everything else [])]
    columns = [
        ("n", -6),
        ("ε", -6),
        ("who", 22),
        ("s", -7),
        ("value err", -9),
        ("grad err", -9),
        ("MB", -7),
        ("matrix MB", -9),
        ("sweeps", -6),
    ]
    table = Table("The transport cost, value and gradient in the points", columns)
    for n in sizes:
        for epsilon in (0.1, 0.01) if n < 10_000 else (0.1,):
            _transport(table, n, epsilon)
    columns = [column for column in columns if column[0] != "sweeps"]
    table = Table("The Sinkhorn divergence, value and gradient in the points", columns)
    for n in sizes:
        for epsilon in (0.1, 0.01) if n < 10_000 else (0.1,):
            _divergence(table, n, epsilon)


def _clouds(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, 3, generator=generator)
    return x, 0.3 * torch.randn(n, 3, generator=generator) + torch.tensor([0.5, 0.7, 0.2])


def _transport(table: Table, n: int, epsilon: float) -> None:
    x, y = _clouds(n)
    sweeps: dict[str, int] = {}

    def ours(tol: float, name: str) -> Gradient:
        def run() -> tuple[Tensor, Tensor]:
            leaf = x.clone().requires_grad_()
            found = sinkhorn_points(leaf, y, epsilon=epsilon, tol=tol, block_size=max(2**19 // n, 1))
            sweeps[name] = int(found.iterations)
            return found.dual_value.detach(), torch.autograd.grad(found.dual_value, leaf)[0]

        return run

    def dense() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        value = sinkhorn(torch.cdist(leaf, y) ** 2, epsilon=epsilon, tol=1e-6).dual_value
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    exact = ours(1e-12, "exact")()
    for name, tol in (("ours, tol 1e-6", 1e-6), ("ours, tol 1e-10", 1e-10)):
        _row(table, n, epsilon, name, ours(tol, name), exact, sweeps)
    if n <= 2000:
        _row(table, n, epsilon, "ours, dense, tol 1e-6", dense, exact, sweeps)
    if installed("POT") and epsilon == 0.1:  # its plain sweeps would take minutes at a lower one
        _row(table, n, epsilon, "POT, lazy, tol 1e-6", _pot(x, y, epsilon, sweeps), exact, sweeps)


def _pot(x: Tensor, y: Tensor, epsilon: float, sweeps: dict[str, int]) -> Gradient:
    import ot

    n = len(x)

    def run() -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, log = ot.bregman.empirical_sinkhorn2(
                x.numpy(), y.numpy(), epsilon, isLazy=True, batchSize=max(2**19 // n, 1), numIterMax=300, stopThr=1e-6, log=True
            )
        f, g = (epsilon * torch.from_numpy(log[key]) for key in ("u", "v"))
        sweeps["POT, lazy, tol 1e-6"] = 10 * len(log["err"])
        value = (f.mean() + g.mean()).clone()
        slope = torch.empty_like(x)
        for place, part in zip(torch.arange(n).split(2**19 // n), x.split(2**19 // n), strict=True):
            P = torch.exp((f[place].unsqueeze(-1) + g - torch.cdist(part, y) ** 2) / epsilon)
            slope[place] = 2 * (P.sum(-1, keepdim=True) * part - P @ y)
        return value, slope

    return run


def _divergence(table: Table, n: int, epsilon: float) -> None:
    x, y = _clouds(n)

    def ours(tol: float, block_size: int | None) -> Gradient:
        def run() -> tuple[Tensor, Tensor]:
            leaf = x.clone().requires_grad_()
            value = sinkhorn_divergence(leaf, y, epsilon=epsilon, tol=tol, block_size=block_size).value
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        return run

    def geomloss() -> tuple[Tensor, Tensor]:
        from geomloss import SamplesLoss

        # Its cost is half the squared distance.
        loss = SamplesLoss("sinkhorn", p=2, blur=(epsilon / 2) ** 0.5, scaling=0.9, backend="tensorized")
        leaf = x.clone().requires_grad_()
        value = 2 * loss(leaf, y)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    block = max(2**19 // n, 1)
    exact = ours(1e-12, block)()
    contestants = {"ours, tol 1e-3": ours(1e-3, block), "ours, tol 1e-6": ours(1e-6, block)}
    if n <= 2000:
        contestants["ours, dense, tol 1e-6"] = ours(1e-6, None)
    if installed("geomloss"):
        contestants["geomloss, scaling 0.9"] = geomloss
    for name, run in contestants.items():
        _row(table, n, epsilon, name, run, exact, None)


def _row(
    table: Table, n: int, epsilon: float, name: str, run: Gradient, exact: tuple[Tensor, Tensor], sweeps: dict[str, int] | None
) -> None:
    begin = time.process_time()
    value, slope = run()
    seconds = time.process_time() - begin
    if name.startswith("POT"):
        tracemalloc.start()
        run()
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    else:
        memory = peak_memory(run)
    errors = [float((part - true).abs().max() / true.abs().max()) for part, true in zip((value, slope), exact, strict=True)]
    last = [] if sweeps is None else [sweeps.get(name)]
    table.row(n, epsilon, name, seconds, *errors, memory / 2**20, n * n * 8 / 2**20, *last)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    parser.add_argument("--all", action="store_true", help="5,000 and 10,000 points too, minutes more")
    options = parser.parse_args()
    main(short=options.short, everything=options.all)
