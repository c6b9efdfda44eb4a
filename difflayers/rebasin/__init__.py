"""Re-basin: bringing the weights of trained networks together modulo the permutations of their hidden units."""

from .activation_matching import activation_matching
from .barrier import LossCurve, barrier, interpolate, loss_curve, repair_batchnorm
from .matching import weight_matching
from .merging import MergedModels, merge_models
from .spec import Occurrence, PermutationSpec

__all__ = [
    "LossCurve",
    "MergedModels",
    "Occurrence",
    "PermutationSpec",
    "activation_matching",
    "barrier",
    "interpolate",
    "loss_curve",
    "merge_models",
    "repair_batchnorm",
    "weight_matching",
]
