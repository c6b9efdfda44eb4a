"""Betti numbers: known shapes, the Euler characteristic, duality of foreground and background."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from difflayers.errors import ShapeError
from difflayers.morphology import betti_error, betti_numbers
from tests.morphology.published import euler_characteristic
from tests.morphology.shapes import noise, tube


def test_known_images() -> None:
    cross = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    diamond = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])
    images = torch.stack([cross, diamond, torch.zeros(3, 3), torch.ones(3, 3)])[None]
    assert betti_numbers(images).tolist() == [[[1, 0], [1, 1], [0, 0], [1, 0]]]
    assert betti_numbers(images, adjacency=4).tolist() == [[[5, 0], [4, 0], [0, 0], [1, 0]]]


def test_known_volumes() -> None:
    shell = torch.ones(5, 5, 5)
    shell[1:4, 1:4, 1:4] = 0
    shell[2, 2, 2] = 1
    octahedron = torch.zeros(5, 5, 5)
    octahedron[2, 2, 1] = octahedron[2, 2, 3] = octahedron[2, 1, 2] = octahedron[2, 3, 2] = octahedron[1, 2, 2] = octahedron[3, 2, 2] = 1
    volumes = torch.stack([shell, octahedron])[:, None]
    assert betti_numbers(volumes).tolist() == [[[2, 0, 1]], [[1, 0, 1]]]
    assert betti_numbers(volumes, adjacency=6).tolist() == [[[2, 0, 1]], [[6, 0, 0]]]
    assert betti_numbers(tube()).tolist() == betti_numbers(tube(), adjacency=6).tolist() == [[[1, 1, 0]]]
    frame = torch.zeros(1, 1, 3, 3, 3)
    frame[..., 0::2, 0::2, :] = frame[..., 0::2, :, 0::2] = frame[..., :, 0::2, 0::2] = 1
    assert betti_numbers(frame, adjacency=6).tolist() == [[[1, 5, 0]]]


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 3), st.floats(0.1, 0.9), st.integers(0, 1000), st.integers(1, 6))
def test_euler_characteristic_and_duality(ndim: int, density: float, seed: int, size: int) -> None:
    image = noise((1, 1, size, *(5, 4)[: ndim - 1]), density, seed)
    numbers = betti_numbers(image)[0, 0].tolist()
    assert sum((-1) ** i * b for i, b in enumerate(numbers)) == euler_characteristic(image[0, 0].numpy())
    # The background, in a box of foreground that is left out, has a component for each cavity, the outside, and the same tunnels.
    background = 1 - functional.pad(image, (1,) * (2 * ndim))
    dual = betti_numbers(background, adjacency=2 * ndim)[0, 0].tolist()
    reverse = [*reversed(numbers)]
    assert dual == [reverse[0] + 1, *reverse[1:]]
    back = betti_numbers(image, adjacency=2 * ndim)[0, 0].tolist()
    assert betti_numbers(background)[0, 0].tolist() == [back[-1] + 1, *reversed(back[:-1])]


def test_error() -> None:
    ring, disc = torch.ones(2, 1, 3, 3), torch.ones(2, 1, 3, 3)
    ring[..., 1, 1] = 0
    assert betti_error(disc, ring).tolist() == [[1], [1]]
    assert betti_error(disc.bool(), disc.double()).tolist() == [[0], [0]]
    with pytest.raises(ShapeError, match="one shape"):
        betti_error(disc, ring[:1])


def test_arguments() -> None:
    assert betti_numbers(torch.zeros(0, 2, 3, 3)).shape == (0, 2, 2)
    assert betti_numbers(torch.ones(1, 1, 2, 2, dtype=torch.uint8)).dtype == torch.int64
    with pytest.raises(ShapeError, match=r"\(B, C, H, W\)"):
        betti_numbers(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="8 or 4 in 2"):
        betti_numbers(torch.zeros(1, 1, 3, 3), adjacency=26)
