"""Sorting networks beside diffsort: time forward and backward, agreement, memory.

``python -m benchmarks.sorting``. Both compute in float64 with the same distribution and steepness. The loss is a fixed weighting of the
permutation, of the values or of the ranks. diffsort always builds the permutation. Memory is the most that torch holds at once in
both passes, beyond what it held before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import Table, describe_machine, installed, one_thread, peak_memory, race
from difflayers.sorting import SortingNetwork
from difflayers.sorting.relaxations import DISTRIBUTIONS

CASES = [
    # network, n, batch, what the loss is made of
    ("bitonic", 32, 64, "permutation"),
    ("bitonic", 128, 64, "permutation"),
    ("bitonic", 512, 2, "permutation"),
    ("bitonic", 1024, 1, "permutation"),
    ("odd_even", 32, 64, "permutation"),
    ("bitonic", 128, 64, "values"),
    ("odd_even", 32, 64, "values"),
    ("bitonic", 128, 64, "ranks"),
]
SHORT = CASES[:1] + CASES[4:5]


def main(*, short: bool = False) -> None:
    """Print both tables.

    Args:
        short: two small cases.
    """
    one_thread()
    describe_machine(["diffsort"])
    if not installed("diffsort"):
        print("diffsort is not installed: pip install diffsort. Our times only.")
    speed(SHORT if short else CASES)
    if installed("diffsort"):
        agreement()


def speed(cases: list[tuple[str, int, int, str]]) -> None:
    columns = [("network", 9), ("n", -5), ("batch", -5), ("loss on", 12), ("ours ms", -9), ("diffsort ÷", -10)]
    columns += [("gradients differ", -16), ("ours MB", -9), ("diffsort ÷", -10)]
    table = Table("Forward and backward, distribution cauchy, steepness 10", columns)
    for network, n, batch, of in cases:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, n, dtype=torch.float64, generator=generator).requires_grad_()
        weights = torch.randn(batch, n, n, dtype=torch.float64, generator=generator)
        ours = _ours(SortingNetwork(n, network), x, weights, of)
        runs, peak = {"ours": ours}, peak_memory(ours)
        difference = memory = None
        if installed("diffsort"):
            runs["diffsort"] = theirs = _diffsort(network, n, "cauchy", x, weights, of)
            difference, memory = float((ours() - theirs()).abs().max() / theirs().abs().max()), peak_memory(theirs) / peak
        found = race(runs, budget=3.0)
        ratio = found.ratio("diffsort", "ours") if "diffsort" in runs else None
        table.row(network, n, batch, of, 1e3 * found.seconds("ours"), ratio, difference, peak / 2**20, memory)


def agreement() -> None:
    table = Table(
        "Largest difference to diffsort, n = 32, both networks, steepness 10",
        [("distribution", 14), ("values", -8), ("permutation", -11), ("gradient, relative", -18)],
    )
    for distribution in DISTRIBUTIONS:
        worst = [0.0, 0.0, 0.0]
        for network in ("bitonic", "odd_even"):
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(8, 32, dtype=torch.float64, generator=generator).requires_grad_()
            weights = torch.randn(8, 32, 32, dtype=torch.float64, generator=generator)
            layer, peer = SortingNetwork(32, network, distribution), _peer(network, 32, distribution)
            ours, theirs = layer.sort(x), peer(x)
            for i, (own, other) in enumerate(zip(ours, theirs, strict=True)):
                worst[i] = max(worst[i], float((own - other).detach().abs().max()))
            slopes = [torch.autograd.grad((P * weights).sum() + v.square().sum(), x)[0] for v, P in (ours, theirs)]
            worst[2] = max(worst[2], float((slopes[0] - slopes[1]).abs().max() / slopes[1].abs().max()))
        table.row(distribution, *worst)


def _ours(layer: SortingNetwork, x: Tensor, weights: Tensor, of: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        if of == "permutation":
            loss = (layer.sort(x).permutation * weights).sum()
        else:
            loss = ((layer(x) if of == "values" else layer.rank(x)) * weights[:, 0]).sum()
        return torch.autograd.grad(loss, x)[0]

    return run


def _peer(network: str, n: int, distribution: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    from diffsort import DiffSortNet

    return DiffSortNet(network, n, steepness=10.0, distribution=distribution, **({"art_lambda": 0.25} if "phi" in distribution else {}))


def _diffsort(network: str, n: int, distribution: str, x: Tensor, weights: Tensor, of: str) -> Callable[[], Tensor]:
    peer = _peer(network, n, distribution)
    places = torch.arange(1, n + 1, dtype=x.dtype)

    def run() -> Tensor:
        values, permutation = peer(x)
        if of == "permutation":
            loss = (permutation * weights).sum()
        else:
            loss = ((values if of == "values" else permutation @ places) * weights[:, 0]).sum()
        return torch.autograd.grad(loss, x)[0]

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
