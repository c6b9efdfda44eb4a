"""Convex optimization as layers: quadratic programs of every kind, dense and batched."""

from __future__ import annotations

from .qp import QPLayer, QPSolution, solve_qp

__all__ = ["QPLayer", "QPSolution", "solve_qp"]
