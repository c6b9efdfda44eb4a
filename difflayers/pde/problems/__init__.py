"""Equations to learn from: residuals, initial conditions drawn at random, and reference solvers that can be trusted."""

from .diffusion_sorption import DiffusionSorption
from .problem import Problem

__all__ = [
    "DiffusionSorption",
    "Problem",
]
