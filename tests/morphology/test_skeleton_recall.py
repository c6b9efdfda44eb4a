"""Skeleton recall: covered shares of known tubes."""

from __future__ import annotations

import pytest
import torch

from difflayers.morphology import SkeletonRecallLoss, skeletonize
from tests.morphology.shapes import blobs


def test_known_bars() -> None:
    bars = torch.zeros(1, 2, 9, 20)
    bars[:, 0, 4], bars[:, 1, 1:8] = 1, 1
    covered = bars.clone()
    covered[..., 5:] = 0
    loss = SkeletonRecallLoss(smooth=0.0, radius=0)
    assert float(loss(bars, bars)) == 0
    skeleton = skeletonize(bars, probabilistic=False, num_iter=None)
    share = ((skeleton * covered).sum((2, 3)) / skeleton.sum((2, 3))).mean()
    assert float(loss(covered, bars)) == pytest.approx(1 - float(share))
    # Of a line of thickness 7 the tube of radius 2 has thickness 5, of one of thickness 1 it has 1.
    flat = torch.full_like(bars, 0.25).requires_grad_()
    (slope,) = torch.autograd.grad(SkeletonRecallLoss(smooth=0.0, reduction="sum")(flat, bars), flat)
    assert torch.equal(slope[0, 0] < 0, bars[0, 0] == 1)
    assert int((slope[0, 1, :, 10] < 0).sum()) == 5


def test_an_empty_target_costs_nothing() -> None:
    prediction, empty = torch.full((2, 1, 4, 4), 0.5, requires_grad=True), torch.zeros(2, 1, 4, 4)
    for smooth in (0.0, 1.0):
        loss = SkeletonRecallLoss(smooth=smooth, reduction="none")(prediction, empty)
        assert loss.tolist() == [0.0, 0.0]
        assert not torch.autograd.grad(loss.sum(), prediction)[0].any()


def test_options() -> None:
    logits = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = (3 * blobs((2, 1, 8, 8, 8), 0.5) * torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))).long()
    each = SkeletonRecallLoss(softmax=True, to_onehot_y=True, include_background=False, reduction="none")(logits, classes)
    assert each.shape == (2,)
    assert ((each > 0) & (each < 1)).all()
    for options in ({"radius": -1}, {"smooth": -1.0}):
        with pytest.raises(ValueError, match=r"radius|smooth"):
            SkeletonRecallLoss(**options)
