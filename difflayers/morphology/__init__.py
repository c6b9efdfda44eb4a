"""Skeletons that gradients can pass through, exact in topology, and the losses and metrics that are built on them."""

from .skeletonize import Skeletonize, skeletonize
from .soft_skeleton import soft_skeletonize
from .topology import betti_error, betti_numbers

__all__ = ["Skeletonize", "betti_error", "betti_numbers", "skeletonize", "soft_skeletonize"]
