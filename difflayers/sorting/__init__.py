"""Sorting, ranking and top-k, relaxed so that gradients pass."""

from __future__ import annotations

from .network import SortingNetwork, SortResult

__all__ = ["SortResult", "SortingNetwork"]
