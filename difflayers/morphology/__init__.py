"""Skeletons that gradients can pass through, exact in topology, and the losses and metrics that are built on them."""

from .cldice import SoftCLDiceLoss, cldice_score
from .medial_axis import skeleton_radius
from .skeleton_recall import SkeletonRecallLoss
from .skeletonize import Skeletonize, skeletonize
from .soft_skeleton import soft_skeletonize
from .topology import betti_error, betti_numbers

__all__ = [
    "SkeletonRecallLoss",
    "Skeletonize",
    "SoftCLDiceLoss",
    "betti_error",
    "betti_numbers",
    "cldice_score",
    "skeleton_radius",
    "skeletonize",
    "soft_skeletonize",
]
