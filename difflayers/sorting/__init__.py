"""Sorting, ranking and choosing the largest, relaxed so that they can be differentiated."""

from __future__ import annotations

from .soft_argsort import soft_argsort
from .soft_rank import soft_rank, soft_sort
from .soft_topk import soft_topk

__all__ = ["soft_argsort", "soft_rank", "soft_sort", "soft_topk"]
