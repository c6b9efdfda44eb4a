"""Convex optimization as layers: quadratic programs of every kind, dense and batched, and projections on convex sets."""

from __future__ import annotations

from . import projections
from .projections import Projection
from .qp import QPLayer, QPSolution, solve_qp

__all__ = ["Projection", "QPLayer", "QPSolution", "projections", "solve_qp"]
