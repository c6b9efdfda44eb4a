"""Equations to learn from: residuals, initial conditions drawn at random, and reference solvers that can be trusted."""

from .burgers import Burgers
from .diffusion_sorption import DiffusionSorption
from .fisher_kpp import FisherKPP
from .navier_stokes import NavierStokes
from .problem import Problem

__all__ = [
    "Burgers",
    "DiffusionSorption",
    "FisherKPP",
    "NavierStokes",
from .porous_medium import Diffusion, GeneralizedPorousMedium, PorousMedium, Stefan

    "Diffusion",
    "GeneralizedPorousMedium",
    "PorousMedium",
    "Problem",
    "Stefan",
]
