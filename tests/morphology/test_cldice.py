"""clDice: the formula, MONAI's conventions, scores of known images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflayers.errors import ShapeError
from difflayers.morphology import Skeletonize, SoftCLDiceLoss, cldice_score, skeletonize, soft_skeletonize
from tests.morphology.shapes import blobs, tube


def example(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits, blobs(shape, 0.4, seed).double()


@pytest.mark.parametrize("shape", [(3, 2, 10, 9), (2, 1, 5, 6, 7)], ids=["images", "volumes"])
def test_the_formula(shape: tuple[int, ...]) -> None:
    logits, target = example(*shape)
    P, losses = torch.sigmoid(logits), []
    for p, t in zip(P, target, strict=True):
        s_p, s_t = (soft_skeletonize(each[None], num_iter=2)[0] for each in (p, t))
        precision, sensitivity = ((s_p * t).sum() + 0.5) / (s_p.sum() + 0.7), ((s_t * p).sum() + 0.5) / (s_t.sum() + 0.7)
        losses.append(1 - 2 * precision * sensitivity / (precision + sensitivity + 0.01))
    exact = torch.stack(losses)
    options = {"iter_": 2, "smooth_nr": 0.5, "smooth_dr": 0.7, "smooth": 0.01}
    torch.testing.assert_close(SoftCLDiceLoss(**options, reduction="none")(P, target), exact)
    torch.testing.assert_close(SoftCLDiceLoss(**options, sigmoid=True)(logits, target), exact.mean())
    torch.testing.assert_close(SoftCLDiceLoss(**options, sigmoid=True, reduction="sum")(logits, target.bool()), exact.sum())


def test_classes() -> None:
    logits, _ = example(2, 3, 8, 8)
    classes = torch.randint(0, 3, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    onehot = torch.cat([classes == c for c in range(3)], 1)
    exact = SoftCLDiceLoss()(torch.softmax(logits, 1), onehot)
    assert torch.equal(SoftCLDiceLoss(softmax=True, to_onehot_y=True)(logits, classes), exact)
    without = SoftCLDiceLoss()(torch.softmax(logits, 1)[:, 1:], onehot[:, 1:])
    assert torch.equal(SoftCLDiceLoss(softmax=True, to_onehot_y=True, include_background=False)(logits, classes.float()), without)


def test_with_an_exact_skeleton() -> None:
    target = tube(16, 2.5)
    for gradient in ("reference", "mask"):
        loss = SoftCLDiceLoss(Skeletonize(gradient=gradient), sigmoid=True)
        logits = (8 * (target - 0.5)).requires_grad_()
        perfect = loss(logits, target)
        (slope,) = torch.autograd.grad(perfect, logits)
        assert 0 <= float(perfect.detach()) < 0.05
        assert torch.isfinite(slope).all()
        assert slope.any()


def test_descent_closes_a_gap() -> None:
    target = torch.zeros(1, 1, 11, 24)
    target[..., 4:7, 1:23] = 1
    start = torch.where(target == 1, 2.0, -2.0)
    start[..., 10:14] = -2.0
    for skeletonizer in (None, Skeletonize(gradient="mask")):
        logits = start.clone().requires_grad_()
        torch.manual_seed(0)
        loss, optimizer = SoftCLDiceLoss(skeletonizer, sigmoid=True), torch.optim.Adam([logits], lr=0.3)
        for _ in range(40):
            optimizer.zero_grad()
            loss(logits, target).backward()
            optimizer.step()
        assert float(cldice_score(logits.detach().sigmoid(), target)) == 1.0 > float(cldice_score(start.sigmoid(), target))


def test_score() -> None:
    line, half, empty = torch.zeros(3, 1, 1, 5, 8)
    line[..., 2, :] = half[..., 2, :4] = 1
    images = torch.stack([line, half, empty], 1)
    pairs = {(0, 0): 1.0, (0, 1): 2 / 3, (1, 0): 2 / 3, (0, 2): 0.0, (2, 0): 0.0, (2, 2): 1.0}
    for (i, j), score in pairs.items():
        assert float(cldice_score(images[:, i : i + 1], images[:, j : j + 1])) == pytest.approx(score)
    assert cldice_score(images, images.bool()).tolist() == [[1.0, 1.0, 1.0]]
    prediction, target = blobs((1, 2, 30, 30), 0.5, 0, 4), blobs((1, 2, 30, 30), 0.5, 1, 4)
    skeletons = [skeletonize(x, probabilistic=False, num_iter=None) for x in (prediction, target)]
    precision, sensitivity = [(s * x).sum((2, 3)) / s.sum((2, 3)) for s, x in zip(skeletons, (target, prediction), strict=True)]
    torch.testing.assert_close(cldice_score(prediction, target), 2 / (1 / precision + 1 / sensitivity))


def test_refusals() -> None:
    logits, target = example(2, 2, 6, 6)
    with pytest.raises(ValueError, match="set sigmoid=True or softmax=True"):
        SoftCLDiceLoss()(logits, target)
    with pytest.raises(ValueError, match=r"target must have values in \[0, 1\].*to_onehot_y"):
        SoftCLDiceLoss(sigmoid=True)(logits, 2 * target + 1)
    with pytest.raises(ShapeError, match=r"shape \(2, 2, 6, 6\) of the input"):
        SoftCLDiceLoss(sigmoid=True)(logits, target[:, :1])
    with pytest.raises(ShapeError, match="one channel"):
        SoftCLDiceLoss(sigmoid=True, to_onehot_y=True)(logits, target)
    with pytest.raises(ShapeError, match="take sigmoid=True"):
        SoftCLDiceLoss(softmax=True)(logits[:, :1], target[:, :1])
    with pytest.raises(ShapeError, match="leaves nothing"):
        SoftCLDiceLoss(sigmoid=True, include_background=False)(logits[:, :1], target[:, :1])
    with pytest.raises(ShapeError, match=r"\(B, C, H, W\)"):
        SoftCLDiceLoss(sigmoid=True)(logits[0], target[0])
    with pytest.raises(ShapeError, match="one shape"):
        cldice_score(target, target[:1])
    for options in ({"sigmoid": True, "softmax": True}, {"reduction": "max"}, {"iter_": -1}, {"smooth": 0.0}, {"smooth_dr": 0.0}):
        with pytest.raises(ValueError, match=r"exclude|reduction|iter_|smooth"):
            SoftCLDiceLoss(**options)
    assert repr(SoftCLDiceLoss(sigmoid=True)) == "SoftCLDiceLoss(sigmoid=True, reduction='mean')"
