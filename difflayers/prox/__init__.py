"""Proximal operators, networks that are proximal operators, and plug-and-play reconstruction as an implicit layer."""

from . import operators
from .matching import MatchingStage, ProximalMatchingLoss, ProximalMatchingSchedule

__all__ = ["MatchingStage", "ProximalMatchingLoss", "ProximalMatchingSchedule", "operators"]
