"""The sorting networks as entries of the registry of layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from difflayers.sorting import SortingNetwork
from tests.layers import Inputs, Layer, randn
from tests.sorting.networks import dense_permutation

__all__ = ["SORTING"]


def _apart(size: int, *features: int) -> Callable[[torch.Generator], Inputs]:
    """Draws values in no order, none near another, and a payload if ``features`` are given."""

    def sample(g: torch.Generator) -> Inputs:
        x = torch.tensor([0.4, -0.3, 0.7, 0.1, -0.6], dtype=torch.float64)[:size] + randn(g, size, scale=0.02)
        return (x, randn(g, size, *features)) if features else (x,)

    return sample


def _network(name: str, size: int, network: str, distribution: str, **options: float) -> tuple[Layer, ...]:
    def module() -> SortingNetwork:
        return SortingNetwork(size, network, distribution, **options)

    layer = module()

    def P(x: Tensor) -> Tensor:
        return dense_permutation(x, network, distribution, **options)

    places = torch.arange(1, size + 1, dtype=torch.float64)
    return (
        Layer(f"SortingNetwork, {name}", layer, _apart(size), reference=lambda x: x @ P(x), module=module),
        Layer(f"SortingNetwork.sort, {name}", lambda x: layer.sort(x).permutation, _apart(size), reference=P),
        Layer(f"SortingNetwork.rank, {name}", layer.rank, _apart(size), reference=lambda x: P(x) @ places),
        Layer(
            f"SortingNetwork with a payload, {name}",
            lambda x, y: layer(x, y)[1],
            _apart(size, 2),
            reference=lambda x, y: P(x).mT @ y,
            leading=False,
        ),
    )


SORTING: tuple[Layer, ...] = (
    *_network("bitonic", 4, "bitonic", "cauchy", steepness=3.0),
    *_network("odd-even", 3, "odd_even", "logistic", steepness=3.0),
    # The padded wires of a size that is no power of two, and an argument that is not linear in the difference.
    *_network("bitonic of five", 5, "bitonic", "logistic_phi", steepness=3.0, art_lambda=0.4)[:2],
)
