"""Equations to learn from: residuals, initial conditions drawn at random, and reference solvers that can be trusted."""

from .diffusion_sorption import DiffusionSorption
from .porous_medium import Diffusion, GeneralizedPorousMedium, PorousMedium, Stefan
from .problem import Problem

__all__ = [
    "Diffusion",
    "DiffusionSorption",
    "GeneralizedPorousMedium",
    "PorousMedium",
    "Problem",
    "Stefan",
]
