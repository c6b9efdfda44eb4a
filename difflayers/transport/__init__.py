"""Optimal transport: plans, potentials and values that can be differentiated to any order at any temperature."""

from .divergence import DivergenceSolution, monge_gap, sinkhorn_divergence
from .points import PointsSolution, entropic_map, sinkhorn_points
from .sinkhorn import SinkhornLayer, TransportSolution, sinkhorn
from .sparse import SparseTransportLayer, sparse_transport

__all__ = [
    "DivergenceSolution",
    "PointsSolution",
    "SinkhornLayer",
    "SparseTransportLayer",
    "TransportSolution",
    "entropic_map",
    "monge_gap",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_points",
    "sparse_transport",
]
