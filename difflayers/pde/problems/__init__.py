"""Equations to learn from: residuals, initial conditions drawn at random, and reference solvers that can be trusted."""

from .burgers import Burgers
from .diffusion_sorption import DiffusionSorption
from .fisher_kpp import FisherKPP
from .fitzhugh_nagumo import FitzHughNagumo
from .navier_stokes import NavierStokes
from .porous_medium import Diffusion, GeneralizedPorousMedium, PorousMedium
from .problem import Problem
from .stefan import Stefan

__all__ = [
    "Burgers",
    "Diffusion",
    "DiffusionSorption",
    "FisherKPP",
    "FitzHughNagumo",
    "GeneralizedPorousMedium",
    "NavierStokes",
    "PorousMedium",
    "Problem",
    "Stefan",
]
