"""What a relaxed sort costs: network, permutahedron, row-wise softmax or transport.

``python -m benchmarks.sorting_families``. Forward and backward in float64, the loss a fixed weighting of the output, with the time of
``torch.sort`` and its gradient as the unit. ``error`` is the largest deviation from the hard values, ranks or permutation, and ``gradient``
the smallest share of inputs with a gradient that is not zero: the strengths are set so that the errors are about alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import Table, describe_machine, one_thread, peak_memory, race
from difflayers.sorting import SortingNetwork, soft_argsort, soft_rank, soft_sort

Layer = Callable[[Tensor], Tensor]


def main(*, short: bool = False) -> None:
    """Print the table.

    Args:
        short: the smallest size only.
    """
    one_thread()
    describe_machine([])
    columns = [("output", 11), ("by", 22), ("n", -5), ("batch", -5), ("ms", -8), ("÷ torch.sort", -12), ("MB", -7)]
    columns += [("error", -8), ("with gradient", -13)]
    table = Table("Forward and backward, values about one apart", columns)
    for n, batch in [(16, 64)] if short else [(16, 64), (128, 64), (1024, 4)]:
        # A step of one between neighbours, in random order, with noise.
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(batch, n, generator=generator).argsort(-1)
        x = (order + 0.2 * torch.randn(batch, n, generator=generator)).double().requires_grad_()
        for output, contestants in _contestants(n).items():
            target = {"values": x.sort(-1).values, "ranks": 1.0 + order.argsort(-1).argsort(-1)}.get(output)
            if target is None:
                target = torch.nn.functional.one_hot(x.argsort(-1), n).mT.double()
            weights = torch.randn(target.shape, dtype=torch.float64, generator=generator)
            runs = {name: _run(layer, x, weights) for name, layer in contestants.items()}
            found = race({**runs, "sort": _run(lambda x: x.sort(-1).values, x, weights.reshape(batch, n, -1)[..., 0])}, budget=2.0)
            for name, layer in contestants.items():
                error = float((layer(x) - target).detach().abs().max())
                alive = float((runs[name]() != 0).double().mean(-1).min())
                cost = found.ratio(name, "sort")
                table.row(output, name, n, batch, 1e3 * found.seconds(name), cost, peak_memory(runs[name]) / 2**20, error, alive)


def _contestants(n: int) -> dict[str, dict[str, Layer]]:
    bitonic, odd_even = SortingNetwork(n, "bitonic", steepness=10.0), SortingNetwork(n, "odd_even", steepness=10.0)
    small = n <= 128  # beyond it the n³ of an odd-even permutation take a minute
    return {
        "values": {
            "bitonic network": bitonic,
            "odd-even network": odd_even,
            "permutahedron": lambda x: soft_sort(x, regularization_strength=0.1),
            "softsort": lambda x: (x.unsqueeze(-2) @ soft_argsort(x, regularization_strength=0.1)).squeeze(-2),
        },
        "ranks": {
            "bitonic network": bitonic.rank,
            "odd-even network": odd_even.rank,
            "permutahedron": lambda x: soft_rank(x, regularization_strength=0.1),
        },
        "permutation": {
            "bitonic network": lambda x: bitonic.sort(x).permutation,
            **({"odd-even network": lambda x: odd_even.sort(x).permutation} if small else {}),
            "softsort": lambda x: soft_argsort(x, regularization_strength=0.1),
            "neuralsort": lambda x: soft_argsort(x, method="neuralsort", regularization_strength=0.1),
            "transport": lambda x: soft_argsort(x, method="sinkhorn", regularization_strength=0.01),
        },
    }


def _run(layer: Layer, x: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad((layer(x) * weights).sum(), x)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    main(short=parser.parse_args().short)
