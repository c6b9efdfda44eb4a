"""Sorting, ranking and top-k, relaxed so that gradients pass, and the losses and metrics that go with them."""

from __future__ import annotations

from .discounted_gain import NDCGLoss, ndcg, ndcg_loss
from .network import SortingNetwork, SortResult
from .permutation_loss import (
    PermutationAccuracy,
    PermutationCrossEntropyLoss,
    permutation_accuracy,
    permutation_cross_entropy,
    permutation_matrix,
)
from .rank_correlation import SpearmanLoss, spearman, spearman_loss
from .ranks import average_rank
from .soft_argsort import soft_argsort
from .soft_rank import soft_rank, soft_sort
from .soft_topk import soft_topk
from .topk_loss import TopKCrossEntropyLoss, topk_accuracy, topk_cross_entropy

__all__ = [
    "NDCGLoss",
    "PermutationAccuracy",
    "PermutationCrossEntropyLoss",
    "SortResult",
    "SortingNetwork",
    "SpearmanLoss",
    "TopKCrossEntropyLoss",
    "average_rank",
    "ndcg",
    "ndcg_loss",
    "permutation_accuracy",
    "permutation_cross_entropy",
    "permutation_matrix",
    "soft_argsort",
    "soft_rank",
    "soft_sort",
    "soft_topk",
    "spearman",
    "spearman_loss",
    "topk_accuracy",
    "topk_cross_entropy",
]
