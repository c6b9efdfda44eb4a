"""Simple points against component counting, end points and counters against arithmetic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers.morphology.simple_points import add_bit, at_least_two, directions, simple_points
from tests.morphology.published import component_numbers, euler_characteristic


def as_words(neighbourhoods: np.ndarray) -> dict[tuple[int, ...], Tensor]:
    """One bit a word."""
    axes = range(1, neighbourhoods.ndim)
    return {
        direction: torch.from_numpy(neighbourhoods[(slice(None), *(1 + direction[i - 1] for i in axes))].astype(np.int64))
        for direction in directions(neighbourhoods.ndim - 1)
    }


def random_neighbourhoods(count: int, density: float | None = None) -> np.ndarray:
    generator = np.random.default_rng(0)
    densities = generator.uniform(0.05, 0.95, (count, 1, 1, 1)) if density is None else density
    return generator.random((count, 3, 3, 3)) < densities


def test_every_neighbourhood_of_the_plane() -> None:
    bits = np.array(list(itertools.product((False, True), repeat=8)))
    plane = np.insert(bits, 4, True, axis=1).reshape(256, 3, 3)
    space = np.zeros((256, 3, 3, 3), bool)
    space[:, 1] = plane
    foreground, background = component_numbers(space)
    expected = torch.from_numpy((foreground == 1) & (background == 1))
    for detection in ("Boolean", "EulerCharacteristic"):
        for neighbourhoods in (plane, space):
            assert torch.equal((simple_points(as_words(neighbourhoods), detection) & 1).bool(), expected)
    assert int(expected.sum()) == 116


def test_random_neighbourhoods_of_space() -> None:
    neighbourhoods = random_neighbourhoods(100_000)
    foreground, background = component_numbers(neighbourhoods)
    found = simple_points(as_words(neighbourhoods)) & 1
    assert np.array_equal(found.numpy().astype(bool), (foreground == 1) & (background == 1))
    assert 0.1 < float(found.double().mean()) < 0.5


def test_the_euler_variant() -> None:
    neighbourhoods = random_neighbourhoods(300)
    found = simple_points(as_words(neighbourhoods), "EulerCharacteristic") & 1
    with_it, without = neighbourhoods.copy(), neighbourhoods.copy()
    with_it[:, 1, 1, 1], without[:, 1, 1, 1] = True, False
    kept = [euler_characteristic(a) == euler_characteristic(b) for a, b in zip(with_it, without, strict=True)]
    assert found.bool().tolist() == kept


def test_the_euler_variant_is_wrong_in_dense_noise() -> None:
    words = as_words(random_neighbourhoods(50_000, 0.5))
    exact, euler = simple_points(words) & 1, simple_points(words, "EulerCharacteristic") & 1
    assert not (exact & ~euler).any()
    assert float((euler & ~exact).double().mean()) == pytest.approx(0.013, abs=0.003)


def test_bits_do_not_see_each_other() -> None:
    neighbourhoods = random_neighbourhoods(62 * 50)
    words = as_words(neighbourhoods)
    weights = 1 << torch.arange(62)
    packed = {direction: (word.reshape(-1, 62) * weights).sum(1) for direction, word in words.items()}
    for detection in ("Boolean", "EulerCharacteristic"):
        found = (simple_points(packed, detection).unsqueeze(1) >> torch.arange(62)) & 1
        assert torch.equal(found.flatten(), simple_points(words, detection) & 1)


@pytest.mark.parametrize("count", [8, 26])
def test_at_least_two(count: int) -> None:
    bits = (torch.rand(count, 300, generator=torch.Generator().manual_seed(0)) < 2 / count).long()
    assert torch.equal(at_least_two(bits) & 1, (bits.sum(0) >= 2).long())


def test_binary_counters() -> None:
    bits = torch.randint(0, 2, (13, 100), generator=torch.Generator().manual_seed(0))
    planes = [torch.zeros(100, dtype=torch.int64) for _ in range(4)]
    before = bits.clone()
    for bit in bits:
        add_bit(planes, bit)
    assert torch.equal(sum(plane << place for place, plane in enumerate(planes)), bits.sum(0))
    assert torch.equal(bits, before)
