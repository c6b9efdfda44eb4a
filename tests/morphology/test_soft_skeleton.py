"""Soft skeletons: the formula written with sorted windows, and what they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from difflayers.errors import ShapeError
from difflayers.morphology import betti_numbers, skeletonize, soft_skeletonize
from tests.morphology.shapes import blobs, noise


def windows(image: Tensor, cross: bool, fill: float) -> Tensor:
    """The voxels of the 3 × 3 (× 3) box, or cross, around each, in a last dimension."""
    ndim = image.dim() - 2
    padded = functional.pad(image, (1,) * (2 * ndim), value=fill)
    for axis in range(2, 2 + ndim):
        padded = padded.unfold(axis, 3, 1)
    box = torch.ones((3,) * ndim, dtype=torch.bool)
    if cross:
        box = torch.stack([i != 1 for i in torch.meshgrid(*[torch.arange(3)] * ndim, indexing="ij")]).sum(0) <= 1
    return padded.flatten(-ndim)[..., box.flatten()]


def reference(image: Tensor, num_iter: int) -> Tensor:
    def opened(x: Tensor) -> Tensor:
        return windows(windows(x, True, torch.inf).amin(-1), False, -torch.inf).amax(-1)

    skeleton = torch.relu(image - opened(image))
    for _ in range(num_iter):
        image = windows(image, True, torch.inf).amin(-1)
        lost = torch.relu(image - opened(image))
        skeleton = skeleton + torch.relu(lost - skeleton * lost)
    return skeleton


@pytest.mark.parametrize("shape", [(2, 2, 9, 7), (1, 2, 5, 6, 4), (1, 1, 1, 3), (1, 1, 1, 2, 1)], ids=str)
def test_the_formula(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for num_iter in (0, 1, 3):
        assert torch.equal(soft_skeletonize(image, num_iter=num_iter), reference(image, num_iter))
    for binary in (noise(shape, 0.7), torch.ones(shape), torch.zeros(shape)):
        assert torch.equal(soft_skeletonize(binary), reference(binary, 3))


def test_it_breaks_what_the_skeleton_keeps() -> None:
    image = blobs((4, 1, 40, 40), 0.5, smooth=5)
    soft = soft_skeletonize(image, num_iter=20)
    exact = skeletonize(image, probabilistic=False, num_iter=None)
    assert torch.equal(betti_numbers(exact), betti_numbers(image))
    assert not torch.equal(betti_numbers(soft), betti_numbers(image))


def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"\(B, C, H, W\)"):
        soft_skeletonize(torch.zeros(4, 4))
    with pytest.raises(ShapeError, match="floating"):
        soft_skeletonize(torch.zeros(1, 1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_iter"):
        soft_skeletonize(torch.zeros(1, 1, 4, 4), num_iter=-1)
