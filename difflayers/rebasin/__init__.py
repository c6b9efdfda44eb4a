"""Re-basin: bringing the weights of trained networks together modulo the permutations of their hidden units."""

from .barrier import LossCurve, barrier, interpolate, loss_curve, repair_batchnorm
from .incremental import IncrementalResult, incremental_rebasin
from .matching import weight_matching
from .objectives import L2Objective, MidpointObjective, RandomPointObjective, l2_distance
from .sinkhorn_rebasin import FitResult, RelaxedPermutations, SinkhornRebasin
from .spec import Occurrence, PermutationSpec

__all__ = [
    "FitResult",
    "IncrementalResult",
    "L2Objective",
    "LossCurve",
    "MidpointObjective",
    "Occurrence",
    "PermutationSpec",
    "RandomPointObjective",
    "RelaxedPermutations",
    "SinkhornRebasin",
    "barrier",
    "incremental_rebasin",
    "interpolate",
    "l2_distance",
    "loss_curve",
    "repair_batchnorm",
    "weight_matching",
]
