"""Proximal operators, networks that are proximal operators, and plug-and-play reconstruction as an implicit layer."""

from . import operators
from .convolutional import ConvolutionalInputConvexNN
from .icnn import InputConvexNN
from .learned import LearnedProximalNetwork
from .nonexpansive import NonexpansiveProximalNetwork

__all__ = [
    "ConvolutionalInputConvexNN",
    "InputConvexNN",
    "LearnedProximalNetwork",
    "NonexpansiveProximalNetwork",
    "operators",
]
from .convex_gradient import ConvexActivation, ConvexGradientNetwork
from .matching import MatchingStage, ProximalMatchingLoss, ProximalMatchingSchedule

__all__ = ["ConvexActivation", "ConvexGradientNetwork", "MatchingStage", "ProximalMatchingLoss", "ProximalMatchingSchedule", "operators"]
from .blur import Blur
from .data_fidelity import L2
from .linear_operators import LinearOperator, Mask, MatrixOperator, adjoint_error, squared_norm
from .plug_and_play import PlugAndPlay

__all__ = ["L2", "Blur", "LinearOperator", "Mask", "MatrixOperator", "PlugAndPlay", "adjoint_error", "operators", "squared_norm"]
