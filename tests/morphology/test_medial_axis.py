"""Radii along skeletons: known shapes, balls that fit, derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from difflayers.errors import ShapeError
from difflayers.morphology import skeleton_radius, skeletonize
from tests.morphology.shapes import blobs, tube


def test_a_tube_has_one_radius() -> None:
    ring = tube(32, 4.0)
    radius = skeleton_radius(skeletonize(ring, probabilistic=False, num_iter=None), ring)
    on = radius[radius > 0]
    assert float(on.median()) == pytest.approx(4.0, abs=0.7)
    assert float(on.min()) > 2.5


def test_the_balls_fit_and_cover() -> None:
    image = blobs((2, 2, 30, 30), 0.4, smooth=5)
    skeleton = skeletonize(image, probabilistic=False, num_iter=None)
    radius = skeleton_radius(skeleton, image)
    rows = torch.stack(torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij"), -1).reshape(-1, 2).float()
    near = torch.cdist(rows, rows)
    for b in range(2):
        for c in range(2):
            r, inside = radius[b, c].flatten(), image[b, c].flatten() == 1
            covered = ((near < r) & (r > 0)).any(1)
            assert not (covered & ~inside).any()
            assert float(covered.sum()) >= 0.75 * float(inside.sum())
            assert torch.equal(r > 0, skeleton[b, c].flatten() == 1)


def test_borders_and_spacing() -> None:
    full = torch.ones(1, 1, 3, 5, 4)
    assert float(skeleton_radius(full, full)[0, 0, 1, 2, 1]) == 2
    assert float(skeleton_radius(full, full, spacing=(5.0, 3.0, 0.5))[0, 0, 1, 2, 1]) == 1
    assert skeleton_radius(full[:0], full[:0]).shape == (0, 1, 3, 5, 4)


def test_derivatives_and_vmap() -> None:
    image = blobs((3, 1, 12, 12), 0.5, smooth=1).unsqueeze(1).double()
    skeleton = torch.rand(image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mapped = vmap(skeleton_radius)(skeleton, image)
    assert torch.equal(mapped, torch.stack([skeleton_radius(s, i) for s, i in zip(skeleton, image, strict=True)]))
    slope = grad(lambda s: skeleton_radius(s, image[0]).sum())(skeleton[0])
    assert torch.equal(slope, skeleton_radius(torch.ones_like(slope), image[0]))
    assert torch.autograd.gradcheck(lambda s: skeleton_radius(s, image[0]), skeleton[0].requires_grad_(), check_forward_ad=True)


def test_refusals() -> None:
    image = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ShapeError, match="one shape"):
        skeleton_radius(image, image[..., :2])
    for spacing in ((1.0,), (1.0, 0.0)):
        with pytest.raises(ValueError, match="2 positive numbers"):
            skeleton_radius(image, image, spacing=spacing)
