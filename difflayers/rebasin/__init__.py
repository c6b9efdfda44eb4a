"""Re-basin: bringing the weights of trained networks together modulo the permutations of their hidden units."""

from .spec import Occurrence, PermutationSpec

__all__ = ["Occurrence", "PermutationSpec"]
