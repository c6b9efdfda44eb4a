"""Optimal transport: plans, potentials and values that can be differentiated to any order at any temperature."""

from .divergence import DivergenceSolution, monge_gap, sinkhorn_divergence
from .points import PointsSolution, entropic_map, sinkhorn_points
from .sinkhorn import SinkhornLayer, TransportSolution, sinkhorn

__all__ = [
    "DivergenceSolution",
    "PointsSolution",
    "SinkhornLayer",
    "TransportSolution",
    "entropic_map",
    "monge_gap",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_points",
]
