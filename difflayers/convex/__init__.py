"""Convex optimization as layers: quadratic programs of every kind, dense or sparse, and projections on convex sets."""

from __future__ import annotations

from . import projections
from .projections import Projection
from .qp import QPLayer, QPSolution, solve_qp
from .sparse_matrix import SparseMatrix

__all__ = ["Projection", "QPLayer", "QPSolution", "SparseMatrix", "projections", "solve_qp"]
