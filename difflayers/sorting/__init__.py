"""Sorting, ranking and top-k, relaxed so that gradients pass."""

from __future__ import annotations

from .network import SortingNetwork, SortResult
from .soft_argsort import soft_argsort
from .soft_rank import soft_rank, soft_sort
from .soft_topk import soft_topk

__all__ = ["SortResult", "SortingNetwork", "soft_argsort", "soft_rank", "soft_sort", "soft_topk"]
