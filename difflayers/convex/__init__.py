"""Convex optimization as layers: quadratic programs, dense or sparse, conic programs, problems written in CVXPY, and projections."""

from __future__ import annotations

from . import projections
from .cone import Cones, ConeSolution, solve_cone
from .cvxpy_layer import CvxpyLayer, CvxpySolution
from .projections import Projection
from .qp import QPLayer, QPSolution, solve_qp
from .solver_interface import cvxpylayers_solver
from .sparse_matrix import SparseMatrix

__all__ = [
    "ConeSolution",
    "Cones",
    "CvxpyLayer",
    "CvxpySolution",
    "Projection",
    "QPLayer",
    "QPSolution",
    "SparseMatrix",
    "cvxpylayers_solver",
    "projections",
    "solve_cone",
    "solve_qp",
]
