"""Sorting, ranking and choosing the largest, relaxed so that they can be differentiated."""

from __future__ import annotations

from .soft_rank import soft_rank, soft_sort

__all__ = ["soft_rank", "soft_sort"]
