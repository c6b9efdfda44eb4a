"""Sorting, ranking and choosing the largest, relaxed so that they can be differentiated, and the losses and metrics that go with it."""

from __future__ import annotations

from .discounted_gain import NDCGLoss, ndcg, ndcg_loss
from .permutation_loss import (
    PermutationAccuracy,
    PermutationCrossEntropyLoss,
    permutation_accuracy,
    permutation_cross_entropy,
    permutation_matrix,
)
from .rank_correlation import SpearmanLoss, spearman, spearman_loss
from .ranks import average_rank
from .soft_rank import soft_rank, soft_sort

__all__ = [
    "NDCGLoss",
    "PermutationAccuracy",
    "PermutationCrossEntropyLoss",
    "SpearmanLoss",
    "average_rank",
    "ndcg",
    "ndcg_loss",
    "permutation_accuracy",
    "permutation_cross_entropy",
    "permutation_matrix",
    "soft_rank",
    "soft_sort",
    "spearman",
    "spearman_loss",
]
