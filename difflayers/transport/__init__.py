"""Optimal transport: plans, potentials and values that can be differentiated to any order at any temperature."""

from .divergence import DivergenceSolution, monge_gap, sinkhorn_divergence
from .sinkhorn import SinkhornLayer, TransportSolution, sinkhorn
from .sparse import SparseTransportLayer, sparse_transport

__all__ = [
    "DivergenceSolution",
    "SinkhornLayer",
    "SparseTransportLayer",
    "TransportSolution",
    "monge_gap",
    "sinkhorn",
    "sinkhorn_divergence",
    "sparse_transport",
]
