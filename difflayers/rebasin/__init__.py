"""Re-basin: bringing the weights of trained networks together modulo the permutations of their hidden units."""

from .activation_matching import activation_matching
from .barrier import LossCurve, barrier, interpolate, loss_curve, repair_batchnorm
from .incremental import IncrementalResult, incremental_rebasin
from .matching import weight_matching
from .merging import MergedModels, merge_models
from .objectives import L2Objective, MidpointObjective, RandomPointObjective, l2_distance
from .sinkhorn_rebasin import FitResult, RelaxedPermutations, SinkhornRebasin
from .spec import Occurrence, PermutationSpec
from .straight_through import straight_through_matching

__all__ = [
    "FitResult",
    "IncrementalResult",
    "L2Objective",
    "LossCurve",
    "MergedModels",
    "MidpointObjective",
    "Occurrence",
    "PermutationSpec",
    "RandomPointObjective",
    "RelaxedPermutations",
    "SinkhornRebasin",
    "activation_matching",
    "barrier",
    "incremental_rebasin",
    "interpolate",
    "l2_distance",
    "loss_curve",
    "merge_models",
    "repair_batchnorm",
    "straight_through_matching",
    "weight_matching",
]
