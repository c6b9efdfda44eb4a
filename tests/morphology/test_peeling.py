"""Peeling: the published definition bit for bit, topology kept, thin and idempotent at the end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difflayers.morphology import betti_numbers, peeling
from difflayers.morphology.peeling import peel
from difflayers.morphology.simple_points import at_least_two, directions, simple_points
from difflayers.morphology.words import Words
from tests.morphology.published import published_skeleton
from tests.morphology.shapes import blobs, noise, tube


def check_against_the_definition(image: Tensor, num_iter: int, detection: str = "Boolean") -> None:
    leaf = image.double().requires_grad_()
    exact = published_skeleton(leaf, num_iter, detection)
    (weight,) = torch.autograd.grad(exact.sum(), leaf)
    found = peel(image.bool().flatten(0, 1), num_iter, detection, count_ties=True)
    assert torch.equal(found.skeleton.view(image.shape).double(), exact.detach())
    deleted = image.bool() & ~found.skeleton.bool().view(image.shape)
    assert torch.equal(torch.where(deleted, 0, 0.5 ** found.ties.view(image.shape).double()), weight)
    plain = peel(image.bool().flatten(0, 1), num_iter, detection, count_ties=False)
    assert torch.equal(plain.skeleton, found.skeleton)
    assert plain.ties is None


@pytest.mark.parametrize("detection", ["Boolean", "EulerCharacteristic"])
@pytest.mark.parametrize("shape", [(2, 1, 9, 12), (1, 2, 1, 5), (1, 1, 2, 2), (2, 1, 4, 5, 6), (1, 1, 1, 6, 3), (1, 1, 2, 2, 2)], ids=str)
def test_the_published_definition(shape: tuple[int, ...], detection: str) -> None:
    check_against_the_definition(noise(shape, 0.6), 0, detection)
    check_against_the_definition(noise(shape, 0.6), 3, detection)
    check_against_the_definition(noise(shape, 1.0), 2, detection)


def test_the_published_definition_across_words() -> None:
    check_against_the_definition(blobs((1, 1, 150, 4), 0.6), 3)
    check_against_the_definition(blobs((1, 1, 130, 4, 3), 0.7), 2)


def test_a_choice_of_words_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(2, 40, 30, 30, dtype=torch.bool)
    images[0, 8:14, 4:20, 4:9] = True
    images[1, 3, 3, 3] = True  # alone: it ties in every round, and no neighbour tells that it is there
    images[1, 20:26, 25:, 10:] = True
    exact = peel(images, 4, "Boolean", count_ties=True)
    monkeypatch.setattr(peeling, "_MANY", 10)
    for count_ties in (True, False):
        found = peel(images, 4, "Boolean", count_ties=count_ties)
        assert torch.equal(found.skeleton, exact.skeleton)
        assert torch.equal(found.rounds, exact.rounds)
        assert found.ties is None or torch.equal(found.ties, exact.ties)


def test_ties_go_on_after_nothing_changes() -> None:
    image = noise((1, 8, 8), 0.6).bool()
    short = peel(image, None, "Boolean", count_ties=True)
    rounds = int(short.rounds)
    assert torch.equal(short.ties, peel(image, rounds, "Boolean", count_ties=True).ties)
    long = peel(image, rounds + 7, "Boolean", count_ties=True)
    assert torch.equal(long.skeleton, short.skeleton)
    assert (long.ties[long.skeleton.bool()] == rounds + 7).all()
    endless = peel(image, 10**9, "Boolean", count_ties=True)
    assert torch.equal(endless.skeleton, short.skeleton)
    assert (endless.ties[endless.skeleton.bool()] == 10**9).all()


def test_an_image_does_not_notice_its_neighbours() -> None:
    images = torch.stack([blobs((1, 1, 20, 20), density, smooth=3)[0, 0] for density in (0.1, 0.5, 0.9)]).bool()
    together = peel(images, None, "Boolean", count_ties=True)
    assert len(set(together.rounds.tolist())) > 1
    for i, image in enumerate(images):
        alone = peel(image[None], None, "Boolean", count_ties=True)
        assert all(torch.equal(part[0], whole[i]) for part, whole in zip(alone, together, strict=True))


def candidates(skeleton: Tensor) -> Tensor:
    """Voxels that are simple and no end points."""
    words = Words(skeleton.flatten(0, 1).bool())
    found = torch.zeros_like(words.fields)
    for subfield in range(len(found)):
        near = words.neighbours(subfield, directions(words.ndim))
        here = words.window(words.fields[subfield])
        words.window(found[subfield]).copy_(simple_points(near) & at_least_two(near.values()) & here & words.inside)
    return words.images(found)


def check_at_convergence(image: Tensor) -> None:
    found = peel(image.bool().flatten(0, 1), None, "Boolean", count_ties=False).skeleton.view(image.shape)
    assert torch.equal(betti_numbers(found), betti_numbers(image))
    assert not (found.bool() & ~image.bool()).any()
    assert not candidates(found).any()
    assert torch.equal(peel(found.bool().flatten(0, 1), None, "Boolean", count_ties=False).skeleton.view(image.shape), found)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(0.2, 0.9), st.booleans(), st.integers(0, 1000))
def test_topology_of_the_plane(height: int, width: int, density: float, smooth: bool, seed: int) -> None:
    shape = (2, 1, height, width)
    check_at_convergence(blobs(shape, density, seed) if smooth else noise(shape, density, seed))


@settings(deadline=None, max_examples=12)
@given(st.tuples(*[st.integers(1, 10)] * 3), st.floats(0.2, 0.9), st.booleans(), st.integers(0, 1000))
def test_topology_of_space(size: tuple[int, ...], density: float, smooth: bool, seed: int) -> None:
    shape = (1, 2, *size)
    check_at_convergence(blobs(shape, density, seed) if smooth else noise(shape, density, seed))


def test_a_ring_becomes_a_curve() -> None:
    ring = tube()
    assert betti_numbers(ring).tolist() == [[[1, 1, 0]]]
    check_at_convergence(ring)
    skeleton = peel(ring[0].bool(), None, "Boolean", count_ties=False).skeleton
    words = Words(skeleton.bool())
    neighbours = sum(
        torch.nn.functional.pad(skeleton, (1,) * 6)[
            (0, *(slice(1 + d, 1 + d + size) for d, size in zip(direction, words.spatial, strict=True)))
        ].int()
        for direction in directions(3)
    )
    assert (neighbours[skeleton[0].bool()] >= 2).all()
    assert int(skeleton.sum()) < 60


def test_no_thick_blocks_but_where_branches_cross() -> None:
    image = blobs((8, 1, 40, 40), 0.5, smooth=4).bool()
    skeleton = peel(image.flatten(0, 1), None, "Boolean", count_ties=False).skeleton
    block = skeleton[:, :-1, :-1] & skeleton[:, 1:, :-1] & skeleton[:, :-1, 1:] & skeleton[:, 1:, 1:]
    assert not block.any()
    # A cross of even width has a block in its middle, of which no pixel can go: each carries a branch.
    cross = torch.eye(6, dtype=torch.bool)
    cross = (cross | cross.flip(0))[None]
    assert torch.equal(peel(cross, None, "Boolean", count_ties=False).skeleton.bool(), cross)


def test_the_euler_variant_loses_topology() -> None:
    image = noise((1, 1, 20, 20, 20), 0.5)
    kept = peel(image[0].bool(), None, "Boolean", count_ties=False).skeleton[None]
    lost = peel(image[0].bool(), None, "EulerCharacteristic", count_ties=False).skeleton[None]
    assert torch.equal(betti_numbers(kept), betti_numbers(image))
    assert not torch.equal(betti_numbers(lost), betti_numbers(image))


@pytest.mark.slow
def test_topology_of_photographs() -> None:
    data = pytest.importorskip("skimage.data")
    for photograph in (
        data.page(),
        data.text(),
        data.coins(),
        data.retina()[::2, ::2, 1],
        data.binary_blobs(256) * 1.0,
        1.0 - data.horse(),
    ):
        grey = torch.from_numpy(photograph.astype("float32"))
        for quantile in (0.2, 0.5, 0.8):
            image = (grey > torch.quantile(grey, quantile)).float()[None, None]
            check_at_convergence(image)
            check_at_convergence(1 - image)


@pytest.mark.slow
def test_topology_of_large_volumes() -> None:
    for seed, density in enumerate((0.2, 0.3, 0.4, 0.5, 0.7)):
        check_at_convergence(noise((1, 1, 40, 40, 40), density, seed))
        check_at_convergence(blobs((1, 1, 70, 40, 40), density, seed, smooth=5))
    check_at_convergence(tube(64, 9.0))
