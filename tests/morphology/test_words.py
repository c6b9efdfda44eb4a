"""Words: what is packed comes back, and every neighbour is where it should be."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from difflayers.morphology.simple_points import directions
from difflayers.morphology.words import Words

# Around the 62 bits of a word (2 · 62 rows), a single voxel, thin ones, no images.
SHAPES = [
    (2, 1, 1),
    (1, 5, 1),
    (1, 1, 6),
    (3, 121, 3),
    (1, 122, 3),
    (1, 123, 2),
    (1, 124, 2),
    (2, 260, 3),
    (0, 3, 4),
    (2, 4, 5, 6),
    (1, 130, 3, 2),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5


@each_shape
def test_round_trip(shape: tuple[int, ...]) -> None:
    images = noise(shape)
    assert torch.equal(Words(images).images(), images.to(torch.uint8))


@each_shape
def test_neighbours(shape: tuple[int, ...]) -> None:
    images = noise(shape)
    words = Words(images)
    padded = functional.pad(images, (1,) * (2 * words.ndim))
    for direction in directions(words.ndim):
        moved = torch.zeros_like(words.fields)
        for subfield in range(len(moved)):
            words.window(moved[subfield]).copy_(words.neighbours(subfield, [direction])[direction])
        shifted = padded[(slice(None), *(slice(1 + d, 1 + d + size) for d, size in zip(direction, words.spatial, strict=True)))]
        assert torch.equal(words.images(moved).bool(), shifted)


def test_subfields_do_not_touch_and_come_in_order() -> None:
    words = Words(torch.zeros(1, 4, 4, 4, dtype=torch.bool))
    assert words.subfields == [(a, b, c) for c, b, a in itertools.product((0, 1), repeat=3)]
    for subfield, parity in enumerate(words.subfields):
        marked = torch.zeros_like(words.fields)
        words.window(marked[subfield]).copy_(words.inside)
        # The first subfield has the odd coordinates.
        starts = [1 - p for p in parity]
        expected = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
        expected[(0, *(slice(start, None, 2) for start in starts))] = 1
        assert torch.equal(words.images(marked), expected)
