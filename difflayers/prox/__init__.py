"""Proximal operators, networks that are proximal operators, and plug-and-play reconstruction as an implicit layer."""

from . import operators
from .blur import Blur
from .convex_gradient import ConvexActivation, ConvexGradientNetwork
from .convolutional import ConvolutionalInputConvexNN
from .data_fidelity import L2
from .icnn import InputConvexNN
from .learned import LearnedProximalNetwork
from .linear_operators import LinearOperator, Mask, MatrixOperator, adjoint_error, squared_norm
from .matching import MatchingStage, ProximalMatchingLoss, ProximalMatchingSchedule
from .nonexpansive import NonexpansiveProximalNetwork
from .operators import *  # noqa: F403  (they have their own page, and may be taken from here, too)
from .plug_and_play import PlugAndPlay

__all__ = [
    "L2",
    "Blur",
    "ConvexActivation",
    "ConvexGradientNetwork",
    "ConvolutionalInputConvexNN",
    "InputConvexNN",
    "LearnedProximalNetwork",
    "LinearOperator",
    "Mask",
    "MatchingStage",
    "MatrixOperator",
    "NonexpansiveProximalNetwork",
    "PlugAndPlay",
    "ProximalMatchingLoss",
    "ProximalMatchingSchedule",
    "adjoint_error",
    "operators",
    "squared_norm",
]
