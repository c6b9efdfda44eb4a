"""Index vectors, matrices and positions say the same of an axis."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers.rebasin.axes import Concatenation, Fixed, Group, Product, index, leaves, positions, transform

from .trees import SIZES, axes


def random_permutations(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(size, generator=generator) for name, size in SIZES.items()}


def test_index_by_hand() -> None:
    axis = Concatenation((Product((Group("a", 2), Fixed(2))), Group("b", 3)))
    swapped = {"a": torch.tensor([1, 0]), "b": torch.tensor([2, 0, 1])}
    assert index(axis, swapped).tolist() == [2, 3, 0, 1, 6, 4, 5]
    assert index(axis, {"b": swapped["b"]}).tolist() == [0, 1, 2, 3, 6, 4, 5]
    assert [place.tolist() for place in positions(axis, "a")] == [[[0, 1], [2, 3]]]
    assert [leaf.size for leaf in leaves(axis)] == [2, 2, 3]


@settings(max_examples=60)
@given(axes, st.integers(0, 99))
def test_matrices_do_what_index_vectors_do(axis, seed) -> None:
    permutations = random_permutations(seed)
    matrices = {name: torch.eye(len(value), dtype=torch.float64)[value] for name, value in permutations.items()}
    x = torch.randn(2, axis.size, 3, dtype=torch.float64)
    torch.testing.assert_close(transform(x, 1, axis, matrices), x[:, index(axis, permutations)], rtol=0, atol=0)


@settings(max_examples=60)
@given(axes, st.integers(0, 99))
def test_positions_follow_their_units(axis, seed) -> None:
    """Permuting one group moves exactly the entries at its positions, unit by unit, as long as it is in one place."""
    permutations = random_permutations(seed)
    for name in SIZES:
        places = positions(axis, name)
        if len(places) != 1:
            continue
        moved = index(axis, {name: permutations[name]})
        torch.testing.assert_close(moved[places[0]], places[0][permutations[name]], rtol=0, atol=0)
        rest = torch.ones(axis.size, dtype=torch.bool)
        rest[places[0].flatten()] = False
        torch.testing.assert_close(moved[rest], torch.arange(axis.size)[rest], rtol=0, atol=0)
