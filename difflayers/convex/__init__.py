"""Convex optimization as layers: quadratic and conic programs, and problems written in CVXPY."""

from __future__ import annotations

from .cone import Cones, ConeSolution, solve_cone
from .cvxpy_layer import CvxpyLayer, CvxpySolution
from .qp import QPLayer, QPSolution, solve_qp

__all__ = ["ConeSolution", "Cones", "CvxpyLayer", "CvxpySolution", "QPLayer", "QPSolution", "solve_cone", "solve_qp"]
