"""The networks sort, at every size."""

from __future__ import annotations

import itertools

import pytest
import torch

from difflayers.sorting.comparators import Wiring, bitonic, odd_even
from tests.sorting.networks import comparators

NETWORKS = {"bitonic": bitonic, "odd_even": odd_even}


def sort_hard(wiring: Wiring, x: torch.Tensor) -> torch.Tensor:
    """Rows ``(batch, n)`` with hard swaps, where the wires beyond the last value hold the largest number."""
    largest = torch.iinfo(x.dtype).max
    y = torch.cat((x.T, torch.full((wiring.wires - wiring.size, x.shape[0]), largest, dtype=x.dtype)))
    for layer in wiring.layers:
        y = layer.moved(y, layer.difference(y).clamp(max=0))
    return y[: wiring.size].T


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", range(1, 12))
def test_zero_one_principle(network: str, size: int) -> None:
    # A network that sorts all zeros and ones sorts everything (Knuth, volume 3).
    x = torch.tensor(list(itertools.product([0, 1], repeat=size)))
    assert torch.equal(sort_hard(NETWORKS[network](size), x), x.sort(-1).values)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [16, 33, 64, 100])
def test_sorts_permutations(network: str, size: int) -> None:
    x = torch.stack([torch.randperm(size, generator=torch.Generator().manual_seed(seed)) for seed in range(50)])
    assert torch.equal(sort_hard(NETWORKS[network](size), x), x.sort(-1).values)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", range(1, 20))
def test_comparators_are_those_of_the_textbook(network: str, size: int) -> None:
    wiring = NETWORKS[network](size)
    ours = []
    for layer, active in wiring.steps(wiring.only_active(torch.ones(sum(wiring.counts)))):
        lower, upper = layer.halves(torch.arange(wiring.wires))
        pairs = zip(lower.flatten().tolist(), layer.facing(upper).flatten().tolist(), active.flatten().tolist(), strict=True)
        ours += [(first, second) for first, second, swaps in pairs if swaps]
    assert sorted(ours) == sorted(comparators(size, network))


@pytest.mark.parametrize(("size", "depth"), [(2, 1), (8, 6), (32, 15), (1024, 55), (5, 6)])
def test_depth_of_the_bitonic_network(size: int, depth: int) -> None:
    assert len(bitonic(size).layers) == depth
