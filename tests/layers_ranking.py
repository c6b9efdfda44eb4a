"""Ranking losses as entries of the registry of layers."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers.sorting import ndcg_loss, permutation_cross_entropy, spearman_loss, topk_cross_entropy
from tests.layers import Inputs, Layer, randn

__all__ = ["RANKING"]

_TARGET = torch.tensor([2.0, 1.0, 4.0, 3.0], dtype=torch.float64)


def _inputs(g: torch.Generator) -> Inputs:
    # In ascending order 1, 2 and 0, 3: with strength 0.7, each pair is one block.
    return torch.tensor([1.0, -1.0, -0.6, 1.3], dtype=torch.float64) + randn(g, 4, scale=0.03), 0.7 + randn(g, scale=0.02).abs()


def _ranks(x: Tensor, strength: Tensor) -> Tensor:
    low, high = x[1:3] / strength, x[[0, 3]] / strength
    low, high = low - low.mean() + 1.5, high - high.mean() + 3.5
    return torch.stack([high[0], low[0], low[1], high[1]])


def _spearman(x: Tensor, strength: Tensor) -> Tensor:
    return spearman_loss(x, _TARGET.to(x).expand_as(x), regularization_strength=strength, reduction="none")


def _spearman_reference(x: Tensor, strength: Tensor) -> Tensor:
    ranks, target = _ranks(x, strength) - 2.5, _TARGET.to(x) - 2.5
    return 1 - (ranks * target).sum() / (ranks.square().sum() * target.square().sum()).sqrt()


def _ndcg(x: Tensor, strength: Tensor) -> Tensor:
    return ndcg_loss(x, _TARGET.to(x).expand_as(x), regularization_strength=strength, reduction="none")


def _ndcg_reference(x: Tensor, strength: Tensor) -> Tensor:
    places = torch.arange(4, 0, -1, dtype=x.dtype)
    ideal = (places / torch.log2(1 + places.flip(0))).sum()
    return 1 - (_TARGET.to(x) / torch.log2(6 - _ranks(x, strength))).sum() / ideal


def _topk(x: Tensor, strength: Tensor) -> Tensor:
    target = torch.zeros(x.shape[:-1], dtype=torch.long)
    return topk_cross_entropy(x, target, {1: 0.5, 2: 0.5}, regularization_strength=strength, reduction="none")


def _topk_reference(x: Tensor, strength: Tensor) -> Tensor:
    z, nu = x / strength, torch.zeros_like(strength)
    for _ in range(30):  # unrolled, so that autograd differentiates it to any order
        mask = torch.sigmoid(z + nu)
        nu = nu - (mask.sum() - 2) / (mask * (1 - mask)).sum()
    return -torch.log((torch.softmax(z, -1)[0] + torch.sigmoid(z + nu)[0]) / 2)


def _matrix(g: torch.Generator) -> Inputs:
    return (0.5 + 0.3 * torch.tanh(randn(g, 2, 2)),)


def _permutation(P: Tensor) -> Tensor:
    return permutation_cross_entropy(P, torch.tensor([5, 3]).expand(P.shape[:-1]), reduction="none")


def _permutation_reference(P: Tensor) -> Tensor:
    return -(P[0, 1].log() + P[1, 0].log() + (1 - P[0, 0]).log() + (1 - P[1, 1]).log()) / 4


RANKING: tuple[Layer, ...] = (
    Layer("spearman_loss", _spearman, _inputs, reference=_spearman_reference),
    Layer("ndcg_loss", _ndcg, _inputs, reference=_ndcg_reference),
    Layer("topk_cross_entropy", _topk, _inputs, reference=_topk_reference),
    Layer("permutation_cross_entropy", _permutation, _matrix, reference=_permutation_reference),
)
