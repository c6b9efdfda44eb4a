"""Soft skeletons and the losses on them as entries of the registry of layers. What is discrete has its checks beside it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from difflayers.morphology import SkeletonRecallLoss, SoftCLDiceLoss, soft_skeletonize
from tests.layers import Inputs, Layer

__all__ = ["MORPHOLOGY"]


def _image(*size: int) -> Layer:
    def call(image: Tensor) -> Tensor:
        return soft_skeletonize(image.reshape(-1, 1, *size), num_iter=1).reshape(image.shape)

    def windows(x: Tensor, cross: bool, fill: float) -> Tensor:
        shifts = [(i, j) for i in range(3) for j in range(3) if not cross or 1 in (i, j)]
        padded = functional.pad(x, (1, 1, 1, 1), value=fill)
        return torch.stack([padded[..., i : i + size[0], j : j + size[1]] for i, j in shifts])

    def reference(x: Tensor) -> Tensor:
        def opened(x: Tensor) -> Tensor:
            return windows(windows(x, True, torch.inf).amin(0), False, -torch.inf).amax(0)

        eroded = windows(x, True, torch.inf).amin(0)
        first, second = torch.relu(x - opened(x)), torch.relu(eroded - opened(eroded))
        return first + torch.relu(second - first * second)

    def sample(g: torch.Generator) -> Inputs:
        return (torch.rand(size, generator=g, dtype=torch.float64),)

    return Layer(f"soft_skeletonize, {len(size)}-D", call, sample, reference=reference if len(size) == 2 else None)


def _loss(kind: type[SoftCLDiceLoss] | type[SkeletonRecallLoss]) -> Layer:
    options = {"iter_": 1} if kind is SoftCLDiceLoss else {"radius": 1}
    loss = kind(sigmoid=True, reduction="none", **options)
    target = torch.tensor([[1.0, 1, 0], [0, 1, 1]], dtype=torch.float64)

    def call(logits: Tensor) -> Tensor:
        images = logits.reshape(-1, 1, 2, 3)
        return loss(images, target.to(images).expand_as(images)).reshape(logits.shape[:-2])

    def sample(g: torch.Generator) -> Inputs:
        return (torch.randn(2, 3, generator=g, dtype=torch.float64),)

    return Layer(kind.__name__, call, sample)


MORPHOLOGY = (_image(3, 3), _image(2, 2, 3), _loss(SoftCLDiceLoss), _loss(SkeletonRecallLoss))
