"""Convex optimization as layers: quadratic programs of every kind, dense or sparse, and batched."""

from __future__ import annotations

from .qp import QPLayer, QPSolution, solve_qp
from .sparse_matrix import SparseMatrix

__all__ = ["QPLayer", "QPSolution", "SparseMatrix", "solve_qp"]
