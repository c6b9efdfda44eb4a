"""Re-basin: bringing the weights of trained networks together modulo the permutations of their hidden units."""

from .barrier import LossCurve, barrier, interpolate, loss_curve, repair_batchnorm
from .spec import Occurrence, PermutationSpec

__all__ = ["LossCurve", "Occurrence", "PermutationSpec", "barrier", "interpolate", "loss_curve", "repair_batchnorm"]
