"""Optimal transport: plans, potentials and values that can be differentiated to any order at any temperature."""

from .sinkhorn import SinkhornLayer, TransportSolution, sinkhorn

__all__ = ["SinkhornLayer", "TransportSolution", "sinkhorn"]
