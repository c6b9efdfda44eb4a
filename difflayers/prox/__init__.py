"""Proximal operators, networks that are proximal operators, and plug-and-play reconstruction as an implicit layer."""

from . import operators
from .blur import Blur
from .data_fidelity import L2
from .linear_operators import LinearOperator, Mask, MatrixOperator, adjoint_error, squared_norm
from .plug_and_play import PlugAndPlay

__all__ = ["L2", "Blur", "LinearOperator", "Mask", "MatrixOperator", "PlugAndPlay", "adjoint_error", "operators", "squared_norm"]
