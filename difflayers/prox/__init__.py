"""Proximal operators, networks that are proximal operators, and plug-and-play reconstruction as an implicit layer."""

from . import operators
from .convex_gradient import ConvexActivation, ConvexGradientNetwork
from .matching import MatchingStage, ProximalMatchingLoss, ProximalMatchingSchedule

__all__ = ["ConvexActivation", "ConvexGradientNetwork", "MatchingStage", "ProximalMatchingLoss", "ProximalMatchingSchedule", "operators"]
